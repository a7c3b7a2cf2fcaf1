"""Loopback servers that stand in for what lies outside: a bucket, the Hub, RunPod's job API."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        http.shutdown()


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
    repos: dict[str, dict[str, bytes]], gated: tuple[str, ...] = (), token: str = "hf_good"
) -> Callable[[Seen], Answer]:
    """A Hugging Face Hub with these files; `gated` repositories want `token`."""
    commit = "c" * 40

    def answer(seen: Seen) -> Answer:
        path = urlsplit(seen.path).path.strip("/")
        repo = next((r for r in repos if f"/{r}/" in f"/{path}/"), None)
        if repo is None:
            return 401, {"x-error-code": "RepoNotFound", "x-error-message": "no such repo"}, b""
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
                        for name, data in files.items()
                    ]
                ).encode()
                return 200, {"content-type": "application/json"}, body
            siblings = [{"rfilename": name} for name in files]
            body = json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode()
            return 200, {"content-type": "application/json"}, body
        revision, _, name = path.partition("/resolve/")[2].partition("/")
        if revision not in ("main", commit):
            return 404, {"x-error-code": "RevisionNotFound"}, b""
        if name not in files:
            return 404, {"x-error-code": "EntryNotFound", "x-repo-commit": commit}, b""
        data = files[name]
        headers = {"etag": f'"{hash(data):x}"', "x-repo-commit": commit}
        return 200, headers, data

    return answer
