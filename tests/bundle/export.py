"""The project as a newcomer gets it, and the bento that `bentoml build` makes of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def files() -> list[str]:
    """The project's own files: those that git has, or would have if everything were committed."""
    argv = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(name for name in listed.split("\0") if name and (ROOT / name).is_file())


def export(to: Path) -> Path:
    """Copy the project's own files to `to`, with the permissions that a clone gives them."""
    for name in files():
        copy = to / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy)
        copy.chmod(0o755 if os.access(ROOT / name, os.X_OK) else 0o644)
    return to


def build(project: Path, home: Path) -> Path:
    """The folder of the bento built from `project`, in a BentoML home of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KLEIN_", "MODEL_"))}
    env = kept | {
        "BENTOML_HOME": str(home),
        "BENTOML_DO_NOT_TRACK": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    argv = [str(BIN / "bentoml"), "build", "--output", "tag"]
    run = subprocess.run(argv, cwd=project, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    said = run.stdout + run.stderr
    assert "ignored" not in said, said
    assert "fallback" not in said, said
    tag = next(x for x in run.stdout.splitlines() if x.startswith("__tag__:"))
    name, version = tag.removeprefix("__tag__:").split(":")
    return home / "bentos" / name / version
