import hashlib
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from klein.errors import InvalidRequest, LoraError
from klein.lora.file import WIDTHS
from klein.lora.library import LoraLibrary, Tokens
from klein.lora.spec import LoraSpec
from klein.models.catalog import MODELS
from klein.settings import Secret
from klein.sources import cache
from klein.sources.cache import Store
from klein.sources.fetch import Fetcher, Reserve
from klein.sources.transport import FetchFailed
from tests.support import loras, servers


def _data(tmp_path: Path, rank: int = 4) -> bytes:
    tensors, metadata = loras.ai_toolkit({"single_blocks.0.linear1": (72, 8)}, rank, trigger="zib")
    return loras.write(tmp_path / "made.safetensors", tensors, metadata).read_bytes()


def _library(
    server: servers.Server, tmp_path: Path, max_bytes: float = 1e9, token: str | None = None
) -> LoraLibrary:
    folder = tmp_path / "folder"
    folder.mkdir(exist_ok=True)
    store = Store(tmp_path / "cache", max_bytes, grace=0)
    fetcher = Fetcher(frozenset({urlsplit(server.url).netloc}))
    tokens = Tokens(None, Secret(token) if token else None)
    return LoraLibrary(folder, store, fetcher, tokens, civitai=server.url)


def test_an_address_is_fetched_once(tmp_path: Path) -> None:
    """The second use needs no network, and leaves the file as it is, down to its times; its name
    shows nothing that could be a token."""
    data = _data(tmp_path)
    with servers.serve(lambda _: (200, {}, data)) as server:
        library = _library(server, tmp_path)
        url = f"{server.url}/anna.safetensors?token=abc"
        states = set()
        for _ in range(2):
            found = library.find(LoraSpec(url))
            states.add(found.identity)
            time.sleep(0.02)
            assert found.path.read_bytes() == data
            assert "abc" not in found.name
        assert len(server.seen) == len(states) == 1
    assert library.find(LoraSpec(url)).rank == 4


def test_two_jobs_one_download(tmp_path: Path) -> None:
    """When two jobs want the same LoRA, one fetches and the other waits for it."""
    data = _data(tmp_path)

    def slow(_: servers.Seen) -> servers.Answer:
        time.sleep(0.3)
        return 200, {}, data

    with servers.serve(slow) as server:
        library = _library(server, tmp_path)
        found: list[str] = []

        def want() -> None:
            found.append(library.find(LoraSpec(f"{server.url}/a")).sha256)

        threads = [threading.Thread(target=want) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        assert len(set(found)) == 1
        assert len(server.seen) == 1


def test_workers_on_one_volume_never_share_a_partial_file(tmp_path: Path) -> None:
    """Two that fetch the same at once write apart; what a dead one left is taken over."""
    one, two = (Store(tmp_path, 1e9, grace=0) for _ in range(2))

    def whole(part: Path, _: Reserve) -> None:
        part.write_bytes(b"whole")

    def nested(part: Path, _: Reserve) -> None:
        part.write_bytes(b"first half")
        other = two.get("ref", whole, name="ref")
        assert other.read_bytes() == b"whole"
        assert part.read_bytes() == b"first half"
        part.write_bytes(b"whole")

    assert one.get("ref", nested, name="ref").read_bytes() == b"whole"

    def dies(part: Path, _: Reserve) -> None:
        part.write_bytes(b"half")
        part.with_suffix(".tag").write_text('"v1"')
        os.utime(part, (1, 1))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one.get("other", dies, name="other")

    def goes_on(part: Path, _: Reserve) -> None:
        assert part.read_bytes() == b"half"
        assert part.with_suffix(".tag").read_text() == '"v1"'

    two.get("other", goes_on, name="other")


def test_progress_is_reported_and_can_stop(tmp_path: Path) -> None:
    """A cancelled job stops its download; the next attempt is not harmed."""
    data = _data(tmp_path, rank=2000)
    with servers.serve(lambda _: (200, {}, data)) as server:
        library = _library(server, tmp_path)
        seen: list[tuple[int, int | None]] = []

        def stop(have: int, total: int | None) -> None:
            seen.append((have, total))
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            library.find(LoraSpec(f"{server.url}/a"), stop)
        assert seen[0][1] == len(data)
        assert library.find(LoraSpec(f"{server.url}/a")).rank == 2000


def test_content_is_verified_before_it_is_kept(tmp_path: Path) -> None:
    """A wrong hash, and an error page that calls itself a LoRA."""
    data = _data(tmp_path)
    good = hashlib.sha256(data).hexdigest()
    with servers.serve(lambda _: (200, {}, data)) as server:
        library = _library(server, tmp_path)
        with pytest.raises(LoraError, match="another sha256"):
            library.find(LoraSpec(f"{server.url}/a#sha256={'0' * 64}"))
        assert library.find(LoraSpec(f"{server.url}/a#sha256={good}")).sha256 == good
    with servers.serve(lambda _: (200, {}, b"<html>please log in</html>")) as server:
        library = _library(server, tmp_path)
        with pytest.raises(LoraError, match="damaged"):
            library.find(LoraSpec(f"{server.url}/b"))
        assert not list((tmp_path / "cache" / "partial").glob("*.part"))


def test_civitai_versions(tmp_path: Path) -> None:
    """The primary .safetensors of a version, its hash checked, with the token where it is due."""
    data = _data(tmp_path)

    def answer(seen: servers.Seen) -> servers.Answer:
        if "authorization" not in seen.headers:
            return 401, {}, b""
        if seen.path == "/api/v1/model-versions/77":
            files = [
                {"name": "a.zip", "downloadUrl": "http://nowhere"},
                {
                    "name": "anna.safetensors",
                    "primary": True,
                    "downloadUrl": f"http://{seen.headers['host']}/file",
                    "hashes": {"SHA256": hashlib.sha256(data).hexdigest().upper()},
                },
            ]
            return 200, {}, json.dumps({"files": files}).encode()
        return (200, {}, data) if seen.path == "/file" else (404, {}, b"")

    with servers.serve(answer) as server:
        with pytest.raises(LoraError, match="CIVITAI_TOKEN"):
            _library(server, tmp_path).find(LoraSpec("civitai:77"))
        library = _library(server, tmp_path, token="secret")
        page = "https://civitai.com/models/1?modelVersionId=77"
        assert library.find(LoraSpec(page)).trigger == "zib"
        assert library.find(LoraSpec("civitai:77")).rank == 4
        with pytest.raises(LoraError, match="status 404"):
            library.find(LoraSpec("civitai:78"))
    assert library.find(LoraSpec("civitai:77")).rank == 4  # nobody is asked for what is here


def test_the_least_recently_used_is_thrown_away(tmp_path: Path) -> None:
    """Down to the limit, but nothing that a job may still be using."""
    data = {f"/{rank}": _data(tmp_path, rank) for rank in (1, 2, 3)}
    room = len(data["/1"]) + len(data["/3"])
    with servers.serve(lambda seen: (200, {}, data[seen.path])) as server:
        library = _library(server, tmp_path, max_bytes=room)
        paths = {}
        for rank in (1, 2):
            paths[rank] = library.find(LoraSpec(f"{server.url}/{rank}")).path
        for each in (paths[2], paths[2].with_suffix(".used")):
            os.utime(each, (1, 1))
        library.find(LoraSpec(f"{server.url}/1"))
        library.find(LoraSpec(f"{server.url}/3"))
        assert not paths[2].exists()
        assert paths[1].exists()
        assert library.find(LoraSpec(f"{server.url}/2")).rank == 2
        assert [seen.path for seen in server.seen] == ["/1", "/2", "/3", "/2"]
        store = Store(tmp_path / "cache", max_bytes=room, grace=60)
        kept = sorted((tmp_path / "cache" / "files").iterdir())
        with pytest.raises(FetchFailed, match="files in use") as caught:
            store.get("more", lambda part, reserve: reserve(room), name="more")
        assert caught.value.retryable
        assert sorted((tmp_path / "cache" / "files").iterdir()) == kept != []


def test_a_read_only_cache_is_used_and_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on a shared read-only volume is found there; the rest goes elsewhere."""
    data = _data(tmp_path)
    with servers.serve(lambda _: (200, {}, data)) as server:
        library = _library(server, tmp_path)
        library.find(LoraSpec(f"{server.url}/old"))
        monkeypatch.setattr(cache, "_writable", lambda _: False)
        monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
        (tmp_path / "cache").chmod(0o555)
        library = _library(server, tmp_path)
        library.find(LoraSpec(f"{server.url}/old"))
        assert len(server.seen) == 1
        new = library.find(LoraSpec(f"{server.url}/new"))
        assert new.path.is_relative_to(tmp_path / "tmp")
        (tmp_path / "cache").chmod(0o755)


def test_the_library_can_be_managed(tmp_path: Path) -> None:
    """Add, list, fetch into, remove; names are plain, nothing is overwritten, junk stays out."""
    data = _data(tmp_path)
    with servers.serve(lambda _: (200, {}, data)) as server:
        library = _library(server, tmp_path)
        row = library.add("anna.safetensors", [data[:100], data[100:]])
        assert (row["name"], row["rank"], row["trigger_words"]) == ("anna.safetensors", 4, ["zib"])
        with pytest.raises(InvalidRequest, match="already"):
            library.add("anna.safetensors", [data])
        for bad in ("../x.safetensors", "a/b.safetensors", "x.pt", ".safetensors"):
            with pytest.raises(InvalidRequest, match="plain file name"):
                library.add(bad, [data])
        with pytest.raises(LoraError, match="damaged"):
            library.add("junk.safetensors", [b"junk"])
        library.add_reference(LoraSpec(f"{server.url}/bob.safetensors"), None)
        names = [(row["name"], row["source"]) for row in library.entries()]
        assert names == [
            ("anna.safetensors", "folder"),
            ("bob.safetensors", "folder"),
            (f"{server.url}/bob.safetensors", "fetched"),
        ]
        (tmp_path / "folder" / "anna.toml").write_text("scale = 0.8")
        library.remove("anna.safetensors")
        assert [p.name for p in (tmp_path / "folder").iterdir()] == ["bob.safetensors"]
        with pytest.raises(LoraError, match="not in the LoRA folder"):
            library.remove("anna.safetensors")


def test_a_damaged_file_in_the_folder_is_listed_with_its_fault(tmp_path: Path) -> None:
    """One bad file must not hide the others."""
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    _data(tmp_path)
    rows = {row["name"]: row for row in LoraLibrary(tmp_path).entries()}
    assert "damaged" in rows["bad.safetensors"]["error"]
    assert rows["made.safetensors"]["base"] == "another model (width 8)"


def test_a_card_beside_a_file(tmp_path: Path) -> None:
    """Its own scale and trigger; a card that says anything else is refused by name."""
    _data(tmp_path)
    card, library = tmp_path / "made.toml", LoraLibrary(tmp_path)
    card.write_text('scale = 0.8\ntrigger = "anna"\n')
    found = library.find(LoraSpec("made.safetensors"))
    assert (found.defaults.scale, found.trigger) == (0.8, "anna")
    for bad in ("scale = 'high'", "scael = 1", "scale ="):
        card.write_text(bad)
        with pytest.raises(LoraError, match=r"made\.toml"):
            library.find(LoraSpec("made.safetensors"))


def test_widths_are_those_of_the_models() -> None:
    """The names by width agree with the table of models."""
    for spec in MODELS.values():
        assert (
            spec.name.replace("base-", "").removeprefix("klein-").lower()
            in WIDTHS[spec.hidden].lower()
        )
