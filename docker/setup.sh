#!/usr/bin/env bash
# Run once, as root, while the image is built, after the Python packages are installed.
set -euo pipefail

# 1. Caches. One folder that every user may write, and BentoML's own folders, which it would else
#    make at the start: so the image runs under any numeric user and with a read-only root, when a
#    volume or a tmpfs lies at /cache and at /tmp.
mkdir -p /cache
chmod 1777 /cache
mkdir -p "$BENTOML_HOME"/{bentos,models,envs,tmp}
chown bentoml:bentoml "$BENTOML_HOME"/{bentos,models,envs,tmp}
chmod 755 "$BENTOML_HOME"

# 2. flash-attn, if asked for: --build-arg FLASH_ATTN=<a requirement, or the URL of a wheel>.
if [ "${FLASH_ATTN:-off}" != off ]; then
	uv pip install --no-build-isolation "$FLASH_ATTN"
fi

# 3. KLEIN_MODE. The image's entrypoint sources this file of the virtual environment and shares its
#    arguments with it; where there are none, the mode decides. A command always wins.
cat >>"$VIRTUAL_ENV/bin/activate" <<'HOOK'

if [ "${0##*/}" = entrypoint.sh ] && [ $# -eq 0 ]; then
	case "$(printf %s "${KLEIN_MODE:-}" | tr '[:upper:]' '[:lower:]' | tr -d '[:space:]')" in
	'' | serve) ;;
	runpod) set -- python -m klein.runpod ;;
	*)
		echo "klein cannot start: KLEIN_MODE: '$KLEIN_MODE' must be one of serve, runpod" >&2
		exit 1
		;;
	esac
fi
HOOK
