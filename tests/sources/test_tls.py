import http.server
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from klein.sources import fetch
from klein.sources.fetch import Fetcher
from klein.sources.transport import FetchFailed

BODY = bytes(range(256)) * 4096


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of our own for localhost, and its key behind it."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    path, key = tmp_path / "own.pem", tmp_path / "key.pem"
    argv = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(
        [*argv.split(), *names, "-keyout", key, "-out", path], check=True, capture_output=True
    )
    path.write_text(path.read_text() + key.read_text())
    return path


@pytest.fixture
def host(certificate: Path) -> Iterator[str]:
    """A server under TLS that answers every GET with BODY."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY)

        def log_message(self, format: str, *args: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    yield f"localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_certificate_nobody_vouches_for_is_refused(host: str) -> None:
    """It is not a fault that passes; hosts of one's own need a proper one too."""
    with pytest.raises(FetchFailed, match="no valid certificate") as caught:
        Fetcher(frozenset({host})).read(f"https://{host}/x", len(BODY))
    assert not caught.value.retryable


def test_what_comes_under_tls_comes_whole(
    host: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short waits of the transport lose nothing of it; another name is refused."""
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(fetch, "tls", lambda: trusting)
    assert Fetcher(frozenset({host})).read(f"https://{host}/x", len(BODY)) == BODY
    other = host.replace("localhost", "127.0.0.1")
    with pytest.raises(FetchFailed, match="no valid certificate"):
        Fetcher(frozenset({other})).read(f"https://{other}/x", len(BODY))
