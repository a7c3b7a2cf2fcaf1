import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from klein.sources.address import is_public
from klein.sources.fetch import Fetcher, Offer
from klein.sources.transport import FetchFailed, Watch
from tests.support import servers

BODY = bytes(range(256)) * 400


def _own(url: str) -> Fetcher:
    return Fetcher(frozenset({urlsplit(url).netloc}))


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_what_is_public(address: str, public: bool) -> None:
    """Loopback, private, link-local, shared, multicast, and all of them in IPv6 clothes are not."""
    assert is_public(address) is public


def test_private_addresses_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By name as well as by number, and nothing is ever sent there."""
    with servers.serve(lambda _: (200, {}, BODY)) as server:
        port = urlsplit(server.url).port
        info = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: info)
        for host in ("127.0.0.1", "evil.example"):
            with pytest.raises(FetchFailed, match="inside this network"):
                Fetcher().download(Offer(f"https://{host}:{port}/x"), tmp_path / "a")
        assert server.seen == []


def test_redirects_are_checked_too(tmp_path: Path) -> None:
    """A public host cannot send us inside, and a token stays with the host it is for."""
    with servers.serve(lambda _: (200, {}, BODY)) as inside:
        inner = inside.url.replace("127.0.0.1", "localhost")
        with servers.serve(lambda _: (302, {"location": f"{inner}/secret"}, b"")) as outer:
            offer = Offer(f"{outer.url}/x", {"authorization": "Bearer t"})
            with pytest.raises(FetchFailed, match="must be reached over https"):
                _own(outer.url).download(offer, tmp_path / "a")
            assert inside.seen == []
            both = Fetcher(frozenset({urlsplit(outer.url).netloc, urlsplit(inner).netloc}))
            both.download(offer, tmp_path / "a")
    assert outer.seen[0].headers["authorization"] == "Bearer t"
    assert "authorization" not in inside.seen[0].headers
    assert (tmp_path / "a").read_bytes() == BODY


def test_endless_redirects_end(tmp_path: Path) -> None:
    """After five."""
    with servers.serve(lambda _: (302, {"location": "/again"}, b"")) as server:
        with pytest.raises(FetchFailed, match="without end"):
            _own(server.url).download(Offer(f"{server.url}/x"), tmp_path / "a")
        assert len(server.seen) == 6


@pytest.mark.parametrize(
    ("status", "says"), [(401, "wants a token"), (403, "wants a token"), (404, "status 404")]
)
def test_refusals_are_named_without_the_address(tmp_path: Path, status: int, says: str) -> None:
    """An address can hold a token; the sentence holds the host only."""
    with servers.serve(lambda _: (status, {}, b"")) as server:
        with pytest.raises(FetchFailed, match=says) as caught:
            _own(server.url).download(Offer(f"{server.url}/x?token=abc"), tmp_path / "a")
        assert "abc" not in str(caught.value)


def test_plain_http_and_user_names_are_refused(tmp_path: Path) -> None:
    """Also for hosts that would be public."""
    for url, says in (("http://x.org/a", "over https"), ("https://u:p@x.org/a", "user name")):
        with pytest.raises(FetchFailed, match=says):
            Fetcher().download(Offer(url), tmp_path / "a")


def test_an_interrupted_download_goes_on(tmp_path: Path) -> None:
    """From the byte where it stopped, if the content is still the same; from the start if not."""
    tag = '"v1"'

    def answer(seen: servers.Seen) -> servers.Answer:
        if seen.headers.get("if-range") == tag:
            start = int(seen.headers["range"].removeprefix("bytes=").rstrip("-"))
            return 206, {"etag": tag}, BODY[start:]
        return 200, {"etag": tag}, BODY

    part = tmp_path / "a.part"

    def stop(have: int, total: int | None) -> None:
        if have > 50_000:
            raise KeyboardInterrupt

    with servers.serve(answer) as server:
        with pytest.raises(KeyboardInterrupt):
            _own(server.url).download(Offer(f"{server.url}/x"), part, Watch(on_bytes=stop))
        had = part.stat().st_size
        assert 0 < had < len(BODY)
        _own(server.url).download(Offer(f"{server.url}/x"), part)
        assert server.seen[1].headers["range"] == f"bytes={had}-"
        assert part.read_bytes() == BODY
        (tmp_path / "a.tag").write_text('"old"')
        _own(server.url).download(Offer(f"{server.url}/x"), part)
        assert part.read_bytes() == BODY


def test_a_broken_off_answer_is_said(tmp_path: Path) -> None:
    """Fewer bytes than promised are not a file."""
    broken = {"content-length": "999999", "connection": "close"}
    with (
        servers.serve(lambda _: (200, broken, BODY)) as server,
        pytest.raises(FetchFailed, match="broke off"),
    ):
        _own(server.url).download(Offer(f"{server.url}/x"), tmp_path / "a")


def test_what_is_too_large_is_not_begun(tmp_path: Path) -> None:
    """The promised length is enough to refuse."""
    huge = {"content-length": str(2**40), "connection": "close"}
    with (
        servers.serve(lambda _: (200, huge, b"")) as server,
        pytest.raises(FetchFailed, match="are the most"),
    ):
        _own(server.url).download(Offer(f"{server.url}/x"), tmp_path / "a")


@pytest.mark.parametrize(
    ("body", "says"), [(b"[" + b"1," * 2_000_000, "too much"), (b"<html>", "JSON")]
)
def test_json_is_bounded(body: bytes, says: str) -> None:
    """And must be JSON."""
    with (
        servers.serve(lambda _: (200, {}, body)) as server,
        pytest.raises(FetchFailed, match=says),
    ):
        _own(server.url).json(server.url, {})
