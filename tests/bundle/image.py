"""Builds the bento and its image with `bentoml containerize`, and runs both of its lives.

    python -m tests.bundle.image                    with Docker, on Linux
    python -m tests.bundle.image --image klein:x    an image that is there already
    python -m tests.bundle.image --engine podman --backend podman

Everything runs on the built-in model, without a GPU and without the network, under the image's own
user or another one, with a read-only root. It ends with 1 at the first thing that is not so.
"""

import argparse
import base64
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from tests.bundle import export
from tests.support import live, servers

JOB = json.loads((live.ROOT / "test_input.json").read_text())
CLOSED = ("--read-only", "--tmpfs", "/tmp", "--tmpfs", "/cache:mode=1777")
"""A root that cannot be written, and the two places that can."""
OFFLINE = {"MODEL_ID": "nano", "KLEIN_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
WORKER = {
    "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
    "RUNPOD_SKIP_GPU_CHECK": "true",
}
STRANGER = "12345:12345"
Options = tuple[str, ...]
Variables = dict[str, str] | None
Shot = Callable[["Bench"], str]


class Bench:
    """An image, and what runs it."""

    def __init__(self, engine: str, network: str, image: str, folder: Path) -> None:
        self.engine, self.image, self.folder = engine, image, folder
        self.network = (f"--network={network}",) if network else ()
        self.served: bytes | None = None

    def argv(self, *command: str, options: Options = (), env: Variables = None) -> list[str]:
        """The command line that runs `command` in the image."""
        pairs = [f"--env={k}={v}" for k, v in (OFFLINE | (env or {})).items()]
        fixed = ["run", "--rm", *self.network, *CLOSED, *options, *pairs]
        return [self.engine, *fixed, self.image, *command]

    def run(
        self, *command: str, code: int = 0, options: Options = (), env: Variables = None
    ) -> str:
        """What `command` printed; it must end with `code`."""
        argv = self.argv(*command, options=options, env=env)
        done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
        said = done.stdout + done.stderr
        assert done.returncode == code, f"{' '.join(argv)} ended with {done.returncode}:\n{said}"
        return said

    def ask(self, *argv: str) -> str:
        """What the engine itself says."""
        return subprocess.run(
            [self.engine, *argv], capture_output=True, text=True, check=True
        ).stdout


def layers(bench: Bench) -> str:
    """The size of the image and of each layer that has one."""
    size = int(bench.ask("image", "inspect", "--format", "{{.Size}}", bench.image))
    history = ("history", "--no-trunc", "--format", "{{.Size}}\t{{.CreatedBy}}")
    rows = bench.ask(*history, bench.image).splitlines()
    lines = []
    for row in rows:
        weight, _, made = row.partition("\t")
        if weight not in ("0B", "0 B"):
            what = made.split("/bin/sh -c")[-1].replace("#(nop)", "").replace(" # buildkit", "")
            what = " ".join(what.split())
            lines.append(f"    {weight:>9}  {what[:86]}")
    return "\n".join([f"{size / 1e9:.2f} GB", *lines])


def user(bench: Bench) -> str:
    """Not root, and nothing but the caches can be written."""
    who = bench.run("id", "-u").strip().splitlines()[-1]
    assert who != "0"
    script = (
        "for x in / /home/bentoml /home/bentoml/bento /app/.venv; do "
        "if touch $x/x 2>/dev/null; then echo $x can be written; exit 1; fi; done; "
        "touch /cache/x /tmp/x"
    )
    bench.run("bash", "-c", script)
    bench.run("bash", "-c", script, options=("--user", STRANGER))
    return f"user {who}; only /cache and /tmp can be written, also by user {STRANGER}"


def secrets(bench: Bench) -> str:
    """No variable of the image holds one, nor does its history speak of one."""
    names = bench.ask("image", "inspect", "--format", "{{json .Config.Env}}", bench.image)
    history = bench.ask("history", "--no-trunc", "--format", "{{.CreatedBy}}", bench.image)
    for word in ("TOKEN", "SECRET", "PASSWORD"):
        assert word not in (names + history).upper(), word
    return "none in the environment or the history"


def serve(bench: Bench) -> str:
    """The default (the repository's own Dockerfile is asked to): /readyz and /generate."""
    port, log = live.free_port(), bench.folder / "serve.log"
    url = f"http://127.0.0.1:{port}"
    names = bench.ask("image", "inspect", "--format", "{{json .Config.Env}}", bench.image)
    mode = {"KLEIN_MODE": "serve"} if "KLEIN_MODE=runpod" in names else {}
    argv = bench.argv(env={"PORT": str(port), "BENTOML_HOST": "127.0.0.1", **mode})
    started = time.monotonic()
    with live.process(argv, live.environment(bench.folder), log) as running:
        live.wait_for(f"{url}/readyz", 200, running, log)
        ready = time.monotonic() - started
        assert live.status(f"{url}/ping") == 200
        body = json.dumps(JOB["input"]).encode()
        request = urllib.request.Request(
            f"{url}/generate", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=200) as answer:
            bench.served = _pixels(answer.read())
    assert "reading the weights from the built-in model" in log.read_text()
    default = "asked to" if mode else "by default"
    return (
        f"{default}: ready after {ready:.1f} s, a picture after {time.monotonic() - started:.1f} s"
    )


def handler(bench: Bench) -> str:
    """The worker as the container's command, as a stranger, on test_input.json."""
    command = ("python", "-m", "klein.runpod", "--test_input", json.dumps(JOB))
    said = bench.run(*command, options=("--user", STRANGER), env=WORKER)
    assert "base64" in said.split("Job result:")[-1], said[-3000:]
    return "test_input.json gives a picture"


def queue(bench: Bench) -> str:
    """KLEIN_MODE=runpod without a command, against RunPod's job API on this machine."""
    platform = servers.RunpodPlatform([{"id": "one", **JOB}, {"id": "bad", "input": {}}], cancel="")
    log = bench.folder / "worker.log"
    with servers.serve(platform) as server:
        hooks = {
            "KLEIN_MODE": "runpod",
            "RUNPOD_WEBHOOK_GET_JOB": f"{server.url}/job-take/w1?",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{server.url}/job-done/w1/$ID?",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{server.url}/job-stream/w1/$ID?",
            "RUNPOD_WEBHOOK_PING": f"{server.url}/ping/w1",
            "RUNPOD_POD_ID": "w1",
            "RUNPOD_AI_API_KEY": "key",
            "RUNPOD_ENDPOINT_ID": "e1",
        }
        argv = bench.argv(env=hooks | WORKER)
        with live.process(argv, live.environment(bench.folder), log) as running:
            _until(lambda: "bad" in {job for job, _ in platform.posts}, running, log)
    results = {job: body for job, body in platform.posts if body.get("status") != "IN_PROGRESS"}
    picture = base64.b64decode(results["one"]["output"]["images"][0]["base64"])
    assert _pixels(picture) == bench.served
    assert results["bad"]["error"].startswith("invalid_request:")
    return f"{len(platform.posts)} posts: progress, a picture with the same pixels, an error"


def cached(bench: Bench) -> str:
    """A model that RunPod cached, readable only, is found without its name's case or a token."""
    hub = bench.folder / "huggingface-cache" / "hub" / "models--Klein--Nano"
    shutil.copytree(live.ROOT / "klein/nano/model", hub / "snapshots" / "abc")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    for path in (bench.folder, *bench.folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    volume = (
        "--volume",
        f"{bench.folder / 'huggingface-cache'}:/runpod-volume/huggingface-cache:ro",
    )
    command = ("python", "-m", "klein.runpod", "--test_input", json.dumps(JOB))
    said = bench.run(*command, options=volume, env={"MODEL_ID": "klein/nano", **WORKER})
    assert "reading the weights from RunPod's cached model: /runpod-volume/" in said, said
    return "RunPod's cached model is found and named"


def refusals(bench: Bench) -> str:
    """A start that cannot succeed ends with one sentence."""
    for env, sentence in (
        ({"KLEIN_MODE": "queue"}, "KLEIN_MODE: 'queue' must be one of serve, runpod"),
        ({"MODEL_ID": "klein-base-9B", "KLEIN_DEVICE": "auto"}, "needs an NVIDIA GPU"),
        ({"KLEIN_OFLOAD": "none"}, "did you mean 'KLEIN_OFFLOAD'"),
    ):
        said = bench.run(code=1, env=env)
        assert sentence in said, said
        assert "Traceback" not in said, said
    return "an unknown mode, no GPU, a misspelt setting"


SHOTS: tuple[Shot, ...] = (layers, secrets, user, refusals, serve, handler, queue, cached)


def _pixels(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def _until(condition: Callable[[], bool], running: Any, log: Path) -> None:
    for _ in range(1200):
        if condition():
            return
        assert running.poll() is None, log.read_text()[-3000:]
        time.sleep(0.1)
    raise AssertionError(f"it never came:\n{log.read_text()[-3000:]}")


def containerize(backend: str, image: str, folder: Path) -> str:
    """Build the bento from a clean export and the image from the bento."""
    bento = export.build(export.export(folder / "project"), folder / "bentoml")
    size = sum(path.stat().st_size for path in bento.rglob("*") if path.is_file())
    print(f"bento     {size / 1e6:.1f} MB", flush=True)
    tag = f"{bento.parent.name}:{bento.name}"
    env = live.environment(folder, BENTOML_HOME=str(folder / "bentoml"))
    argv = [str(live.BIN / "bentoml"), "containerize", tag, "--backend", backend, "-t", image]
    started = time.monotonic()
    subprocess.run(argv, env=env, cwd=folder, check=True)
    return f"{image} in {time.monotonic() - started:.0f} s"


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.bundle.image")
    parser.add_argument("--engine", default="docker", help="what runs images: docker or podman")
    parser.add_argument("--network", default="host", help="the engine's; '' for its own default")
    parser.add_argument("--backend", default="docker", help="what bentoml builds them with")
    parser.add_argument("--image", help="an image that is there already")
    args = parser.parse_args()
    if not (live.ROOT / "klein/nano/model/model_index.json").is_file():
        print("klein/nano/model is missing: this needs the built-in model", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="klein-image-") as name:
        folder = Path(name)
        image = args.image
        if image is None:
            image = "klein:bundle-test"
            print(f"built     {containerize(args.backend, image, folder)}", flush=True)
        bench = Bench(args.engine, args.network, image, folder)
        for shot in SHOTS:
            started = time.monotonic()
            try:
                said = shot(bench)
            except AssertionError as error:
                print(f"{shot.__name__:<9} FAILED: {error}", file=sys.stderr)
                return 1
            print(f"{shot.__name__:<9} {said}  [{time.monotonic() - started:.1f} s]", flush=True)
    print("both lives run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
