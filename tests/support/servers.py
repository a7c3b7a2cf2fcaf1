"""Loopback servers that stand in for what lies outside: a bucket, the Hub, RunPod's job API."""

import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Seen:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Server:
    """A running server: its address and what it was sent."""

    url: str
    seen: list[Seen] = field(default_factory=list)


@contextmanager
def serve(answer: Callable[[Seen], Answer]) -> Iterator[Server]:
    """Answer every request on a loopback port with `answer`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            headers = {k.lower(): v for k, v in self.headers.items()}
            seen = Seen(self.command, self.path, headers, self.rfile.read(length))
            server.seen.append(seen)
            status, extra, body = answer(seen)
            self.send_response(status)
            for name, value in ({"content-length": str(len(body))} | extra).items():
                self.send_header(name, value)
            self.end_headers()
            self.close_connection = extra.get("connection") == "close"
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = do_PUT = _any

        def log_message(self, format: str, *args: object) -> None:
            return

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_port}")
    threading.Thread(target=http.serve_forever, args=[0.02], daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


@contextmanager
def raw(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server below HTTP: `talk` does with each connection what it likes. Gives host and port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def handle(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                talk(connection)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    threading.Thread(target=handle, args=[connection], daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def bucket() -> Callable[[Seen], Answer]:
    """An S3 bucket that takes PUTs and gives them back."""
    stored: dict[str, bytes] = {}

    def answer(seen: Seen) -> Answer:
        key = urlsplit(seen.path).path
        if seen.method == "PUT":
            stored[key] = seen.body
            return 200, {"etag": '"x"'}, b""
        return (200, {}, stored[key]) if key in stored else (404, {}, b"")

    return answer


def hub(
    repos: dict[str, dict[str, bytes]],
    gated: tuple[str, ...] = (),
    token: str = "hf_good",
    told: dict[str, int | None] | None = None,
) -> Callable[[Seen], Answer]:
    """A Hugging Face Hub with these files; `gated` repositories want `token`.

    Weights lie in its storage, another host with signed addresses: the Hub redirects there, their
    size and hash in the headers. `told` is the size it tells of a repository's weights instead of
    the true one, or None for no size at all.
    """
    commit = "c" * 40
    sizes = {} if told is None else told

    def answer(seen: Seen) -> Answer:
        path = urlsplit(seen.path).path.strip("/")
        repo = next((r for r in repos if f"/{r}/" in f"/{path}/"), None)
        if repo is None:
            return 401, {"x-error-code": "RepoNotFound", "x-error-message": "no such repo"}, b""
        if path.startswith("storage/"):
            return 200, {}, repos[repo][path.removeprefix(f"storage/{repo}/")]
        if repo in gated and token not in seen.headers.get("authorization", ""):
            return 401, {"x-error-code": "GatedRepo", "x-error-message": "gated"}, b""
        files = repos[repo]
        if path.startswith("api/models/"):
            if "/revision/" in path and not path.endswith(("/main", commit)):
                return 404, {"x-error-code": "RevisionNotFound"}, b""
            if "/tree/" in path:
                body = json.dumps(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": f"{hash(data):x}"}
                        | _lfs(name, data)
                        for name, data in files.items()
                    ]
                ).encode()
                return 200, {"content-type": "application/json"}, body
            siblings = [
                _sibling(name, data, sizes.get(repo, len(data))) for name, data in files.items()
            ]
            body = json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode()
            return 200, {"content-type": "application/json"}, body
        revision, _, name = path.partition("/resolve/")[2].partition("/")
        if revision not in ("main", commit):
            return 404, {"x-error-code": "RevisionNotFound"}, b""
        if name not in files:
            return 404, {"x-error-code": "EntryNotFound", "x-repo-commit": commit}, b""
        data = files[name]
        if not name.endswith(".safetensors"):
            return 200, {"etag": f'"{hash(data):x}"', "x-repo-commit": commit}, data
        size = sizes.get(repo, len(data))
        headers = {
            "location": f"http://localhost:{_port(seen)}/storage/{repo}/{name}",
            "x-repo-commit": commit,
            "x-linked-etag": f'"{hashlib.sha256(data).hexdigest()}"',
        }
        headers |= {} if size is None else {"x-linked-size": str(size)}
        return 302, headers, f"Found. Redirecting to {headers['location']}".encode()

    return answer


def _port(seen: Seen) -> int | None:
    return urlsplit(f"//{seen.headers['host']}").port


def _sibling(name: str, data: bytes, size: int | None) -> dict[str, Any]:
    """A row of a repository's list of files, as `?blobs=true` asks for it."""
    lfs = _lfs(name, data).get("lfs", {})
    told = {"sha256": lfs.get("oid"), "pointerSize": 135} | ({} if size is None else {"size": size})
    return {"rfilename": name} | ({"lfs": told} if lfs else {"size": len(data)})


def _lfs(name: str, data: bytes) -> dict[str, Any]:
    """What the Hub tells besides of a file that lies in its storage."""
    if not name.endswith(".safetensors"):
        return {}
    oid = hashlib.sha256(data).hexdigest()
    return {"lfs": {"oid": oid, "size": len(data), "pointerSize": 135}}


class RunpodPlatform:
    """RunPod's job API as the SDK sees it: hands out jobs, notes every post in order."""

    def __init__(self, jobs: list[dict[str, Any]], cancel: str) -> None:
        self.jobs, self.cancel = jobs, cancel
        self.posts: list[tuple[str, dict[str, Any]]] = []
        self.lock = threading.Lock()
        self.cancelled = False

    def __call__(self, seen: Seen) -> Answer:
        path = seen.path.split("?")[0]
        if path.startswith("/job-take"):
            with self.lock:
                job = self.jobs.pop(0) if self.jobs else None
            if job is None:
                time.sleep(0.2)
                return 204, {}, b""
            return 200, {"content-type": "application/json"}, json.dumps(job).encode()
        if path.startswith("/job-stop"):
            return self._stop()
        if path.startswith(("/job-done", "/job-stream")):
            job_id = path.rstrip("/").split("/")[-1]
            self.posts.append((job_id, json.loads(seen.body)))
        return 200, {"content-type": "application/json"}, b"{}"

    def _stop(self) -> Answer:
        running = any(job == self.cancel for job, _ in self.posts)
        if running and not self.cancelled:
            self.cancelled = True
            body = json.dumps({"jobsToStop": [self.cancel]}).encode()
            return 200, {"content-type": "application/json"}, body
        time.sleep(0.1)
        return 204, {}, b""


def runpod_hooks(server: Server) -> dict[str, str]:
    """What RunPod sets in a worker's environment so that its SDK finds the platform."""
    return {
        "RUNPOD_WEBHOOK_GET_JOB": f"{server.url}/job-take/w1?",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{server.url}/job-done/w1/$ID?",
        "RUNPOD_WEBHOOK_POST_STREAM": f"{server.url}/job-stream/w1/$ID?",
        "RUNPOD_WEBHOOK_PING": f"{server.url}/ping/w1",
        "RUNPOD_POD_ID": "w1",
        "RUNPOD_AI_API_KEY": "key",
        "RUNPOD_ENDPOINT_ID": "e1",
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        "RUNPOD_SKIP_GPU_CHECK": "true",
    }
