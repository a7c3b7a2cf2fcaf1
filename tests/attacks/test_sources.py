"""What strangers' servers and addresses have done to klein, or tried to."""

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from klein.app.prepare import settle_loras
from klein.errors import Cancelled, LoraError, LoraUnavailable
from klein.lora.library import LoraLibrary, Tokens
from klein.lora.metadata import LoraDefaults
from klein.lora.spec import LoraSpec
from klein.settings import Secret
from klein.sources import cache
from klein.sources.address import is_public, redacted
from klein.sources.cache import HEADROOM, Store
from klein.sources.fetch import Fetcher, Offer
from klein.sources.transport import FetchFailed, Watch
from tests.support import fakes, loras, servers

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n"


def _data(tmp_path: Path, rank: int = 4) -> bytes:
    tensors, metadata = loras.ai_toolkit({"single_blocks.0.linear1": (72, 8)}, rank)
    return loras.write(tmp_path / "made.safetensors", tensors, metadata).read_bytes()


def _library(
    url: str, tmp_path: Path, store: Store | None = None, civitai_token: str = "key"
) -> LoraLibrary:
    """A library for which the server at `url` is the Hub, Civitai and every other host."""
    store = store or Store(tmp_path / "cache", 1e9, grace=0)
    own = Fetcher(frozenset({urlsplit(url).netloc, f"localhost:{urlsplit(url).port}"}))
    tokens = Tokens(Secret("hf_key"), Secret(civitai_token))
    return LoraLibrary(tmp_path, store, own, tokens, civitai=url, hub=url)


# -- one caller stops the others (6, 7, 26) ----------------------------------------------------


def _drips(piece: bytes, first: bytes = b"") -> Callable[[socket.socket], None]:
    """A server that begins with `first` and then sends `piece` for ever, a little at a time."""

    def talk(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(piece)
            time.sleep(0.02)

    return talk


def _silent(connection: socket.socket) -> None:
    time.sleep(5)


def _redirects(connection: socket.socket) -> None:
    time.sleep(0.3)
    connection.sendall(b"HTTP/1.1 302 Found\r\nlocation: /on\r\ncontent-length: 0\r\n\r\n")


SLOW = {
    "headers": _drips(b"x", b"HTTP/1.1 200 OK\r\nx: "),
    "1xx": _drips(b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "body": _drips(b"x", OK),
    "nothing": _silent,
    "redirects": _redirects,
}


@pytest.mark.parametrize("talk", SLOW.values(), ids=SLOW.keys())
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_server_holds_a_thread_past_the_deadline(
    tmp_path: Path, scheme: str, talk: Callable[[socket.socket], None]
) -> None:
    """One deadline for the whole exchange, TLS, headers, 1xx answers and redirects included."""
    if scheme == "https" and talk is not _silent:
        pytest.skip("before TLS there is only silence")
    with servers.raw(talk) as host:
        began = time.monotonic()
        with pytest.raises(FetchFailed) as caught:
            Fetcher(frozenset({host})).download(
                Offer(f"{scheme}://{host}/x"), tmp_path / "a", Watch(began + 0.7)
            )
        assert 0.6 < time.monotonic() - began < 1.5
        assert caught.value.retryable


def test_a_slow_name_server_does_not_hold_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking a name up cannot be stopped, so nobody waits for it."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3))
    began = time.monotonic()
    with pytest.raises(FetchFailed, match="took too long"):
        Fetcher().read("https://slow.example/x", 1000, Watch(began + 0.3))
    assert time.monotonic() - began < 2.5


@pytest.mark.parametrize("talk", SLOW.values(), ids=SLOW.keys())
def test_a_cancelled_fetch_ends_at_once(
    tmp_path: Path, talk: Callable[[socket.socket], None]
) -> None:
    """Whatever it waits for; what the caller's check raises is what comes out."""
    with servers.raw(talk) as host:
        began = time.monotonic()

        def check() -> None:
            if time.monotonic() > began + 0.3:
                raise Cancelled("gone")

        with pytest.raises(Cancelled):
            Fetcher(frozenset({host})).download(
                Offer(f"http://{host}/x"), tmp_path / "a", Watch(check=check)
            )
        assert time.monotonic() - began < 5  # its server never ends


def test_a_head_without_end_is_refused(tmp_path: Path) -> None:
    """However fast it comes: 1xx answers are counted in bytes, not only in time."""
    with (
        servers.raw(_drips(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 4000)) as host,
        pytest.raises(FetchFailed, match="headers without end"),
    ):
        Fetcher(frozenset({host})).read(f"http://{host}/x", 1000)


@pytest.mark.parametrize("piece", [b"1\r\nx\r\n", b"2;a=" + b"b" * 50 + b"\r\nxy\r\n"])
def test_a_body_in_single_bytes_is_refused(tmp_path: Path, piece: bytes) -> None:
    """Each costs as much of the processor as a full one, and everything else waits for that."""

    def talk(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            connection.sendall(piece * 1000)

    with (
        servers.raw(talk) as host,
        pytest.raises(FetchFailed, match="pieces of a few bytes") as caught,
    ):
        Fetcher(frozenset({host})).download(
            Offer(f"http://{host}/x"), tmp_path / "a", Watch(time.monotonic() + 5)
        )
    assert not caught.value.retryable


def test_those_who_wait_for_another_download_can_leave(tmp_path: Path) -> None:
    """At their own deadline, while the first goes on; and when the first leaves, one of the
    others takes over where it stopped."""
    data, release = _data(tmp_path, rank=3000), threading.Event()

    def answer(seen: servers.Seen) -> servers.Answer:
        if len(server.seen) == 1:
            release.wait(5)
        start = int(seen.headers.get("range", "bytes=0-")[6:-1])
        span = {"content-range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        return (206 if start else 200), {"etag": '"1"', **span}, data[start:]

    first_left = threading.Event()

    def leave(have: int, _: int | None) -> None:
        first_left.set()
        raise Cancelled("left")

    with servers.serve(answer) as server:
        library, spec = _library(server.url, tmp_path), LoraSpec(f"{server.url}/a")
        outcomes: list[str] = []

        def want(seconds: float, on_bytes: Callable[[int, int | None], None]) -> None:
            began = time.monotonic()
            try:
                found = library.find(spec, on_bytes, deadline=began + seconds)
                outcomes.append(f"rank {found.rank}")
            except (LoraUnavailable, Cancelled) as error:
                outcomes.append(f"{type(error).__name__} {time.monotonic() - began < seconds + 1}")

        first = threading.Thread(target=want, args=[9, leave])
        short = threading.Thread(target=want, args=[0.3, lambda *_: None])
        long = threading.Thread(target=want, args=[9, lambda *_: None])
        for thread in (first, short, long):
            thread.start()
            time.sleep(0.1)
        short.join()
        assert outcomes == ["LoraUnavailable True"]
        release.set()
        first.join()
        long.join()
        assert sorted(outcomes[1:]) == ["Cancelled True", "rank 3000"]
        assert server.seen[1].headers["range"].startswith("bytes=")


def test_those_who_wait_share_the_failure(tmp_path: Path) -> None:
    """Four that want what is not there ask once."""

    def answer(_: servers.Seen) -> servers.Answer:
        time.sleep(0.3)
        return 404, {}, b""

    with servers.serve(answer) as server:
        library, said = _library(server.url, tmp_path), []

        def want() -> None:
            with pytest.raises(LoraError) as caught:
                library.find(LoraSpec(f"{server.url}/a"))
            said.append(str(caught.value))

        threads = [threading.Thread(target=want) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(said) == 4
        assert len(server.seen) == 1


def test_hub_downloads_can_be_stopped(tmp_path: Path) -> None:
    """They go through the same fetcher as all others."""
    with servers.raw(_silent) as host:
        began = time.monotonic()
        with pytest.raises(LoraUnavailable):
            _library(f"http://{host}", tmp_path).find(LoraSpec("me/one"), deadline=began + 0.3)
        assert time.monotonic() - began < 1


# -- results that lie (2, 5) -------------------------------------------------------------------


def test_a_pin_holds_whoever_fetched_first(tmp_path: Path) -> None:
    """Also of an address that is in the cache; the content that is promised needs no network."""
    data = _data(tmp_path)
    good = hashlib.sha256(data).hexdigest()
    with servers.serve(lambda _: (200, {}, data)) as server:
        library = _library(server.url, tmp_path)
        library.find(LoraSpec(f"{server.url}/a"))
        with pytest.raises(LoraError, match="another sha256"):
            library.find(LoraSpec(f"{server.url}/a#sha256={'0' * 64}"))
        assert library.find(LoraSpec(f"{server.url}/a#sha256={good}")).sha256 == good
        asked = len(server.seen)
    assert library.find(LoraSpec(f"{server.url}/elsewhere#sha256={good}")).sha256 == good
    assert asked == 2


def test_a_file_that_rotted_in_the_cache_is_not_used(tmp_path: Path) -> None:
    """Its name is its hash; the next try fetches it again."""
    data = _data(tmp_path)
    with servers.serve(lambda _: (200, {}, data)) as server:
        library, spec = _library(server.url, tmp_path), LoraSpec(f"{server.url}/a")
        path = library.find(spec).path
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(LoraUnavailable, match="damaged on the disk"):
            library.find(spec)
        assert library.find(spec).sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("https://x.org:8443/a.safetensors?token=s", "https://x.org:8443/a.safetensors"),
        (f"https://x.org/a?key=s#sha256={'a' * 64}", f"https://x.org/a#sha256={'a' * 64}"),
        (
            "https://civitai.com/models/1/x?modelVersionId=34&token=s",
            "https://civitai.com/models/1/x?modelVersionId=34",
        ),
        ("https://x.org/a#secret", "https://x.org/a"),
        ("https://u:secret@x.org/a", "https://…"),
        ("https://[::1/secret", "https://…"),
        ("owner/repo@v1", "owner/repo@v1"),
    ],
)
def test_what_is_shown_of_an_address_draws_again_and_tells_nothing(path: str, shown: str) -> None:
    """Port, version and pin stay; what can hold a token goes."""
    assert redacted(path) == shown
    assert redacted(shown) == shown


# -- what is reached and read (9, 19, 20) ------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec("me/one", revision="/etc/passwd"),
        LoraSpec("me/one@../../etc"),
        LoraSpec("me/one@ma\nin"),
        LoraSpec("me/one", weight_name="../x.safetensors"),
        LoraSpec("me/one", weight_name="/etc/passwd"),
        LoraSpec("me/one", weight_name="a\x00.safetensors"),
        LoraSpec("https://[::1/x"),
        LoraSpec("https://x.org:99999/x"),
        LoraSpec("https://a..b/x"),
        LoraSpec("https://bücher..de/x"),
        LoraSpec(f"https://{'a' * 64}.org/x"),
        LoraSpec("https://x.org/a\r\nhost: y"),
        LoraSpec("ftp://x.org/x"),
        LoraSpec("file:///etc/passwd"),
        LoraSpec("https:///x"),
        LoraSpec("civitai:" + "9" * 40),
        LoraSpec("https://civitai.com/models/1?modelVersionId=²"),
        LoraSpec("a\x00.safetensors"),
        LoraSpec("a" * 300 + ".safetensors"),
        LoraSpec("\ud800.safetensors"),
        LoraSpec("ö/ü"),
        LoraSpec("../x"),
        LoraSpec("x/.."),
        LoraSpec(f"a--b/c@{'a' * 40}", weight_name="x.safetensors"),
        LoraSpec(f"a/b.git@{'a' * 40}", weight_name="x.safetensors"),
        LoraSpec("https://[2606:4700::1%eth0]/x"),
    ],
    ids=lambda spec: ascii(spec)[:60],
)
def test_what_is_no_reference_is_refused_by_name(tmp_path: Path, spec: LoraSpec) -> None:
    """As the caller's fault, before anybody is asked; and asking whether it is at hand is safe."""
    with servers.serve(lambda _: (500, {}, b"")) as server:
        library = _library(server.url, tmp_path)
        assert library.is_local(spec)
        with pytest.raises(LoraError) as caught:
            library.find(spec)
        assert not caught.value.retryable
        assert server.seen == []


def test_an_international_name_is_asked_in_ascii(tmp_path: Path) -> None:
    """As browsers do, and a path in percent-encoding."""
    with pytest.raises(LoraUnavailable, match=r"xn--bcher-kva\.invalid has no address"):
        _library("http://127.0.0.1:1", tmp_path).find(LoraSpec("https://bücher.invalid/ä"))


@pytest.mark.parametrize(
    "address",
    [
        "fec0::1",
        "192.0.0.1",
        "192.0.0.170",
        "64:ff9b::1",
        "64:ff9b:1::7f00:1",
        "::",
        "::127.0.0.1",
        "::ffff:0:127.0.0.1",
        "5f00::1",
        "ff0e::1",
    ],
)
def test_addresses_that_only_look_public(address: str) -> None:
    """Site-local and protocol addresses, and what translates to or tunnels to others."""
    assert not is_public(address)


def test_the_civitai_token_stays_with_civitai(tmp_path: Path) -> None:
    """Whatever host a `downloadUrl` names; and what is at hand needs no Civitai."""
    data = _data(tmp_path)

    def elsewhere(_: servers.Seen) -> servers.Answer:
        return 200, {}, data

    with servers.serve(elsewhere) as other:
        url = other.url.replace("127.0.0.1", "localhost")
        files = [{"name": "x.safetensors", "downloadUrl": f"{url}/x"}]
        with servers.serve(lambda _: (200, {}, json.dumps({"files": files}).encode())) as civitai:
            hosts = frozenset({urlsplit(x).netloc for x in (url, civitai.url)})
            store, tokens = Store(tmp_path / "cache", 1e9, grace=0), Tokens(None, Secret("key"))
            library = LoraLibrary(None, store, Fetcher(hosts), tokens, civitai=civitai.url)
            assert not library.is_local(LoraSpec("civitai:5"))
            assert library.find(LoraSpec("civitai:5")).rank == 4
            assert civitai.seen[0].headers["authorization"] == "Bearer key"
            assert "authorization" not in other.seen[0].headers
    assert library.is_local(LoraSpec("civitai:5"))
    assert library.find(LoraSpec("civitai:5")).rank == 4


def test_no_token_is_written_to_the_disk(tmp_path: Path) -> None:
    """What the cache keeps of an address is its hash and what may be shown."""
    data = _data(tmp_path)
    with servers.serve(lambda _: (200, {}, data)) as server:
        _library(server.url, tmp_path).find(LoraSpec(f"{server.url}/a?token=sesame"))
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert kept
    assert not any(b"sesame" in path.read_bytes() for path in kept)


def test_no_token_reaches_a_warning(tmp_path: Path) -> None:
    """What was settled of a LoRA is told under its redacted address."""
    file_of = fakes.FakeLibrary().find(LoraSpec("x"), lambda *_: None)
    path = "https://x.org/a.safetensors?token=sesame"
    asked = fakes.resolved(loras=[{"path": path, "trigger": "auto"}]).params
    own = replace(file_of, defaults=LoraDefaults(0.5, None))
    _, warnings = settle_loras(asked, [own])
    assert [warning.partition(" ")[0] for warning in warnings] == [redacted(path)] * 2


# -- whose fault it is (21, 25) ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [(404, LoraError), (403, LoraError), (429, LoraUnavailable), (503, LoraUnavailable)],
)
def test_what_may_pass_is_retryable(tmp_path: Path, status: int, kind: type[LoraError]) -> None:
    """A server that is busy or broken is not the caller's fault; one that refuses is."""
    with servers.serve(lambda _: (status, {}, b"")) as server:
        for path in (f"{server.url}/a", "me/one", "civitai:7"):
            with pytest.raises(LoraError) as caught:
                _library(server.url, tmp_path).find(LoraSpec(path))
            assert type(caught.value) is kind


def test_a_dead_host_is_retryable(tmp_path: Path) -> None:
    """A refused connection, and one that breaks off."""
    hang_up = socket.socket.close
    with servers.raw(hang_up) as host, pytest.raises(LoraUnavailable):
        _library(f"http://{host}", tmp_path).find(LoraSpec(f"http://{host}/a"))
    with pytest.raises(LoraUnavailable, match="cannot be reached"):
        _library("http://127.0.0.1:1", tmp_path).find(LoraSpec("http://127.0.0.1:1/a"))


@pytest.mark.parametrize(
    "location", ["https://[::1/x", "http://x:99999/", "https://a..b/", "\\\\x", "ftp://x/", "//"]
)
def test_a_redirect_to_no_address_is_said(tmp_path: Path, location: str) -> None:
    """In one sentence that names the host which sent us there."""
    with (
        servers.serve(lambda _: (302, {"location": location}, b"")) as server,
        pytest.raises(LoraError, match=r"127\.0\.0\.1|over https"),
    ):
        _library(server.url, tmp_path).find(LoraSpec(f"{server.url}/a"))


def test_a_strange_etag_poisons_nothing(tmp_path: Path) -> None:
    """It is not sent back, so every later try is as good as the first."""
    data = _data(tmp_path, rank=3000)
    with servers.serve(lambda _: (200, {"etag": '"\xe9\x01"'}, data)) as server:
        library, spec = _library(server.url, tmp_path), LoraSpec(f"{server.url}/a")

        def stop(_: int, __: int | None) -> None:
            raise Cancelled("stop")

        with pytest.raises(Cancelled):
            library.find(spec, stop)
        assert library.find(spec).rank == 3000


def test_errors_name_what_was_asked_for(tmp_path: Path) -> None:
    """Never a file of klein's own that the caller has not seen."""
    with servers.serve(lambda _: (200, {}, b"<html>")) as server:
        spec = LoraSpec(f"{server.url}/anna.safetensors?token=x")
        with pytest.raises(LoraError, match=r"anna\.safetensors' is damaged") as caught:
            _library(server.url, tmp_path).find(spec)
        assert ".part" not in str(caught.value)
        assert "token" not in str(caught.value)


# -- what fills up (15, 16, 27) ----------------------------------------------------------------


def test_a_complete_part_is_taken(tmp_path: Path) -> None:
    """A kill after the last byte leaves one; the server has nothing after it and says 416."""
    data = _data(tmp_path)

    def answer(seen: servers.Seen) -> servers.Answer:
        if "range" in seen.headers:
            return 416, {"content-range": f"bytes */{len(data)}"}, b""
        return 200, {"etag": '"1"'}, data

    part = tmp_path / "a.part"
    part.write_bytes(data)
    part.with_suffix(".tag").write_text('"1"')
    with servers.serve(answer) as server:
        fetcher = Fetcher(frozenset({urlsplit(server.url).netloc}))
        fetcher.download(Offer(f"{server.url}/a"), part)
        assert part.read_bytes() == data
        part.write_bytes(data + b"more")
        part.with_suffix(".tag").write_text('"1"')
        fetcher.download(Offer(f"{server.url}/a"), part)
        assert part.read_bytes() == data
        assert len(server.seen) == 3


def test_a_kill_leaves_no_tag_beside_another_files_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next try would put the end of one file behind the start of the other."""
    data = _data(tmp_path)
    part = tmp_path / "a.part"
    part.write_bytes(data[:50])
    part.with_suffix(".tag").write_text('"old"')
    real = Path.open

    def killed(path: Path, mode: str = "r", **options: Any) -> Any:
        if path == part and "w" in mode:
            raise KeyboardInterrupt
        return real(path, mode, **options)

    with servers.serve(lambda _: (200, {"etag": '"new"'}, data)) as server:
        fetcher = Fetcher(frozenset({urlsplit(server.url).netloc}))
        monkeypatch.setattr(Path, "open", killed)
        with pytest.raises(KeyboardInterrupt):
            fetcher.download(Offer(f"{server.url}/a"), part)
        monkeypatch.undo()
        fetcher.download(Offer(f"{server.url}/a"), part)
        assert "range" not in server.seen[-1].headers
    assert part.read_bytes() == data


def test_a_clock_that_was_set_back_makes_nothing_young(tmp_path: Path) -> None:
    """What was used "in ten years" makes room like everything else, a branch of the Hub is asked
    again, and parts do not stay."""
    data = _data(tmp_path)
    ten_years = time.time() + 10 * 365 * 86400
    with servers.serve(servers.hub({"me/one": {"a.safetensors": data}})) as server:
        store = Store(tmp_path / "cache", 2 * len(data), grace=60)
        library = _library(server.url, tmp_path, store)
        library.find(LoraSpec("me/one"))
        for path in (tmp_path / "cache").rglob("*"):
            os.utime(path, (ten_years, ten_years))
        assert not library.is_local(LoraSpec("me/one"))
        assert store.get("b", _put(2 * len(data)), name="b").exists()
    left = tmp_path / "cache" / "partial" / "x.part"
    left.write_bytes(b"x")
    os.utime(left, (ten_years, ten_years))
    Store(tmp_path / "cache", 1000, grace=0)
    assert not left.exists()


def test_many_small_files_are_bounded_in_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, and references to them: each would make every later fetch and list slower."""
    monkeypatch.setattr(cache, "MAX_FILES", 8)
    store = Store(tmp_path, 1e9, grace=0)
    for number in range(20):
        store.get(f"a{number}", _put(100), name=f"a{number}")
    assert len(list((tmp_path / "files").glob("*.safetensors"))) <= 8
    last = store.get("last", _put(100), name="last")
    for number in range(20):
        store.link(f"branch{number}", last, name="last")
    assert len(list((tmp_path / "refs").iterdir())) <= 8
    assert store.find("branch19")


def _put(size: int) -> Callable[[Path, Callable[[int], None]], None]:
    def fetch(part: Path, reserve: Callable[[int], None]) -> None:
        reserve(size)
        part.write_bytes(os.urandom(size))

    return fetch


def test_parts_count_and_are_thrown_away(tmp_path: Path) -> None:
    """Interrupted downloads are the first to go when there is no room, and nothing goes over."""
    store = Store(tmp_path, 1000, grace=0)

    def breaks(part: Path, reserve: Callable[[int], None]) -> None:
        reserve(600)
        part.write_bytes(bytes(600))
        raise FetchFailed("broke off", retryable=True)

    with pytest.raises(FetchFailed, match="broke off"):
        store.get("a", breaks, name="a")
    with pytest.raises(FetchFailed, match="files in use") as caught:  # it may still be resumed
        store.get("b", _put(600), name="b")
    assert caught.value.retryable
    for part in (tmp_path / "partial").iterdir():
        os.utime(part, (1, 1))
    assert store.get("b", _put(600), name="b").exists()
    assert not list((tmp_path / "partial").iterdir())
    with pytest.raises(FetchFailed, match="larger than the whole cache") as caught:
        store.get("c", _put(1001), name="c")
    assert not caught.value.retryable


def test_downloads_at_once_share_the_limit(tmp_path: Path) -> None:
    """What is promised to one is not there for another, though it is not written yet."""
    store = Store(tmp_path, 1000, grace=60)

    def nested(part: Path, reserve: Callable[[int], None]) -> None:
        reserve(700)
        with pytest.raises(FetchFailed, match="files in use"):
            store.get("b", _put(400), name="b")
        part.write_bytes(bytes(700))

    assert store.get("a", nested, name="a").exists()


def test_what_a_killed_worker_left_is_cleaned_up(tmp_path: Path) -> None:
    """A day later, when the next one starts."""
    (tmp_path / "partial").mkdir()
    for name in ("old.part", "old.tag", "new.part"):
        (tmp_path / "partial" / name).write_bytes(b"x")
    for name in ("old.part", "old.tag"):
        os.utime(tmp_path / "partial" / name, (1, 1))
    Store(tmp_path, 1000, grace=0)
    assert [path.name for path in (tmp_path / "partial").iterdir()] == ["new.part"]


def test_a_full_disk_evicts(tmp_path: Path) -> None:
    """Until there is room; and when there is none even then, it is no fault of the caller."""
    used = [0]

    def free(_: Path) -> int:
        return HEADROOM + 1000 - _used(tmp_path) - used[0]

    store = Store(tmp_path, 1e9, grace=0, free=free)
    first = store.get("a", _put(600), name="a")
    assert store.get("b", _put(700), name="b").exists()
    assert not first.exists()
    used[0] = 10_000
    with pytest.raises(FetchFailed, match="full") as caught:
        store.get("c", _put(700), name="c")
    assert caught.value.retryable


def _used(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "files").glob("*"))


def test_hub_files_count_too(tmp_path: Path) -> None:
    """They lie in the one store, bounded as all others, and HF_HOME stays empty."""
    data = _data(tmp_path)
    with servers.serve(servers.hub({"me/one": {"a.safetensors": data}})) as server:
        found = _library(server.url, tmp_path).find(LoraSpec("me/one"))
        assert found.path.is_relative_to(tmp_path / "cache" / "files")
        tokens = {seen.path: seen.headers.get("authorization") for seen in server.seen}
    for path, token in tokens.items():
        assert token == (None if path.startswith("/storage/") else "Bearer hf_key")
