"""What strange LoRA files, names and folders have done to klein, or tried to."""

import json
import os
import resource
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from klein.errors import InvalidRequest, LoraError, LoraUnavailable
from klein.lora import file
from klein.lora.file import Identity, LoraFile
from klein.lora.library import LoraLibrary
from klein.lora.metadata import MAX_TRIGGER, MAX_TRIGGERS
from klein.lora.spec import LoraSpec
from klein.sources.cache import Store
from klein.sources.fetch import Fetcher
from klein.sources.safetensors import Entry
from tests.support import loras, servers

LAYER = "diffusion_model.single_blocks.0.linear1"


def _plain(rank: int = 4) -> tuple[dict[str, loras.Array], dict[str, str]]:
    return loras.ai_toolkit({"single_blocks.0.linear1": (72, 8)}, rank, trigger="zib")


def _save(folder: Path, name: str = "x.safetensors", **metadata: str) -> Path:
    tensors, own = _plain()
    return loras.write(folder / name, tensors, own | metadata)


def _raw(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


# -- results that lie (1, 3, 4) ----------------------------------------------------------------


def _loaded(found: LoraFile) -> bytes:
    """A LoRA's tensors, read as `load` has them read."""

    tensors = found.load(_read, lambda tensors: tensors)
    return b"".join(tensors)


def _read(fd: int, entries: tuple[Entry, ...]) -> list[bytes | memoryview]:
    return [os.pread(fd, entry.end - entry.begin, entry.begin) for entry in entries]


@pytest.mark.parametrize("settled", [False, True])
def test_a_replaced_file_is_never_taken_for_the_one_inspected(
    tmp_path: Path, settled: bool
) -> None:
    """Replaced, changed in place with its old time, cut off, deleted: said, and not applied."""
    path = _save(tmp_path)
    original = path.read_bytes()
    found = replace(file.inspect(path, "x"), settled=settled)
    assert original.endswith(_loaded(found))
    other, _ = _plain(rank=8)
    loras.write(path, other)
    with pytest.raises(LoraUnavailable, match="was replaced"):
        _loaded(found)
    path.write_bytes(original)
    found = replace(file.inspect(path, "x"), settled=settled)
    time.sleep(0.02)  # a tick of the file system's clock: within one only the hash can tell
    with path.open("r+b") as changed:  # one byte, with the old size, inode and time
        changed.seek(-1, os.SEEK_END)
        changed.write(bytes([original[-1] ^ 1]))
    os.utime(path, ns=(found.identity.mtime_ns, found.identity.mtime_ns))
    with pytest.raises(LoraUnavailable, match="was replaced"):
        _loaded(found)
    os.truncate(path, 100)
    with pytest.raises(LoraUnavailable):
        _loaded(found)
    path.unlink()
    with pytest.raises(LoraUnavailable, match="cannot be read any more"):
        _loaded(found)


def test_a_change_while_it_is_read_is_seen(tmp_path: Path) -> None:
    """Also of a file that had settled: what was read is hashed then."""
    path = _save(tmp_path)
    found = replace(file.inspect(path, "x"), settled=True)
    time.sleep(0.02)

    def read(fd: int, entries: tuple[Entry, ...]) -> list[bytes | memoryview]:
        raw = bytearray(path.read_bytes())
        raw[entries[0].begin] ^= 1
        path.write_bytes(raw)
        return _read(fd, entries)

    with pytest.raises(LoraUnavailable, match="was replaced"):
        found.load(read, lambda tensors: tensors)


def test_two_changes_within_a_tick_are_told_apart(tmp_path: Path) -> None:
    """A file that had not settled when it was inspected is known by its hash alone."""
    path = _save(tmp_path)
    fresh = file.inspect(path, "x")
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    same = replace(fresh, identity=Identity.of(path.stat()))
    assert not same.settled
    with pytest.raises(LoraUnavailable, match="was replaced"):
        _loaded(same)


def test_a_file_that_settled_is_hashed_once(tmp_path: Path) -> None:
    """And one that was only touched or linked is still the one inspected."""
    path = _save(tmp_path)
    fresh = file.inspect(path, "x")
    assert not fresh.settled
    found = replace(fresh, settled=True)

    def read(_: int, entries: tuple[Entry, ...]) -> int:
        return len(entries)

    assert found.load(read, lambda _: pytest.fail("hashed again")) == 2
    time.sleep(0.02)
    path.touch()
    os.link(path, tmp_path / "link")
    assert path.read_bytes().endswith(_loaded(found))


def _layer(parts: Mapping[str, tuple[int, ...]], name: str = LAYER) -> dict[str, loras.Array]:
    return {f"{name}.{part}": loras.random(shape, 1) for part, shape in parts.items()}


LORA = {"lora_A.weight": (4, 8), "lora_B.weight": (72, 4)}
LOKR = {"lokr_w1": (8, 2), "lokr_w2": (9, 4)}
LOHA = {"hada_w1_a": (72, 4), "hada_w1_b": (4, 8), "hada_w2_a": (72, 4), "hada_w2_b": (4, 8)}


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (LOKR | {"dora_scale": (72, 1)}, "dora_scale beside its lokr"),
        (LOHA | {"dora_scale": (72, 1)}, "dora_scale beside its loha"),
        ({"dora_scale": (72, 1)}, "magnitudes and no factors"),
        ({"lora_A.weight": (0, 8), "lora_B.weight": (72, 0)}, "do not fit together"),
        (LOHA | {"hada_w2_a": ()}, "do not fit together"),
        (LOHA | {"hada_w2_a": (72, 2), "hada_w2_b": (2, 8)}, "do not fit together"),
        (LOHA | {"hada_w2_b": (5, 8)}, "do not fit together"),
        ({"lora_A.weight": (4,), "lora_B.weight": (72, 4)}, "do not fit together"),
        ({"lora_A.weight": (4, 8, 1, 1), "lora_B.weight": (72, 4)}, "do not fit together"),
        ({"lokr_w1": (8,), "lokr_w2": (9, 4)}, "do not fit together"),
        ({"diff": ()}, "do not fit together"),
        (
            {"lora_A.weight": (4, 8), "lora_B.weight": (8, 4), "dora_scale": (1, 8)},
            "do not fit together",
        ),
        (LORA | {"alpha": (0,)}, "do not fit together"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_what_would_act_wrongly_or_break_later_is_refused_at_once(
    tmp_path: Path, parts: dict[str, tuple[int, ...]], says: str
) -> None:
    """Before a merge has begun, and before it is said to be applied."""
    path = loras.write(tmp_path / "x.safetensors", _layer(parts))
    with pytest.raises(LoraError, match="LoRA 'x'") as caught:
        file.inspect(path, "x")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "swapped"),
    [
        ("lora_unet_final_layer_adaLN_modulation_1", True),
        ("diffusion_model.final_layer.adaLN_modulation.1", True),
        ("transformer.norm_out.linear", False),
    ],
)
def test_scale_and_shift_are_in_their_order(tmp_path: Path, name: str, swapped: bool) -> None:
    """In every spelling of the layer that Black Forest Labs and diffusers order differently."""
    parts = {"lora_down.weight": (4, 8), "lora_up.weight": (16, 4)}
    path = loras.write(tmp_path / "x.safetensors", _layer(parts, name))
    (patch,) = file.inspect(path, "x").patches
    assert (patch.modules, patch.target.swapped_halves) == (("norm_out.linear",), swapped)
    if swapped:
        lokr = _layer({"lokr_w1": (4, 2), "lokr_w2": (4, 4)}, name)
        path = loras.write(tmp_path / "y.safetensors", lokr)
        with pytest.raises(LoraError, match="halves"):
            file.inspect(path, "y")


# -- one file stops the others (10, 12) --------------------------------------------------------


def _entry(name: str, **extra: object) -> dict[str, object]:
    return {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | extra}


NESTED = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    "header",
    [
        json.dumps(_entry("transformer." * 160_000 + "x.lora_A.weight")).encode(),
        b'{"a":' + NESTED + b"}",
        b'{"__metadata__":{"a":' + NESTED + b"}}",
        b'{"a":' + b"[{}," * 2_000_000 + b"}",
        b"[" + b"{}," * 2_700_000 + b"{}]",
        json.dumps(_entry("a", shape=[1] * 9)).encode(),
        json.dumps(_entry("a", shape=[2**60, 2**60])).encode(),
        json.dumps(_entry("a", shape=[True])).encode(),
        json.dumps(_entry("a", shape=1)).encode(),
        json.dumps(_entry("a", data_offsets=[0, 4, 8])).encode(),
        json.dumps(_entry("a", data_offsets=None)).encode(),
        json.dumps(_entry("a", dtype=["F32"])).encode(),
        json.dumps(_entry("a\x00b")).encode(),
        json.dumps(_entry("\ud800")).encode(),
        json.dumps({"__metadata__": {"a": 1}} | _entry("a")).encode(),
        json.dumps(_entry("a", data_offsets=[0, 10**400])).encode(),
        b'{"a":' + b"1" * 5000 + b"}",
        b" " * (file.MAX_HEADER_BYTES + 1),
        b"\xff\xfe{}",
    ],
    ids=range(19),
)
def test_a_hostile_header_is_refused_quickly(tmp_path: Path, header: bytes) -> None:
    """Names, counts, ranks, nesting and numbers have bounds; none takes a second."""
    path = _raw(tmp_path / "x.safetensors", header, b"0000")
    began = time.process_time()
    with pytest.raises(LoraError, match="LoRA 'x' is damaged") as caught:
        file.inspect(path, "x")
    assert time.process_time() - began < 1
    assert len(str(caught.value)) < 500


def test_the_parts_of_a_header_are_counted_before_they_are_made(tmp_path: Path) -> None:
    """8 MB of JSON can become hundreds of megabytes of objects."""
    path = _raw(tmp_path / "x.safetensors", b"[" + b"{}," * 2_700_000 + b"{}]")
    with pytest.raises(LoraError, match="too many parts"):
        file.inspect(path, "x")


@pytest.mark.parametrize(
    "tags",
    [
        "[" * 100_000,
        '{"a":' * 50_000 + "1" + "}" * 50_000,
        json.dumps({"1_x": {"word " * 1000: 1}}),
        json.dumps({"1_x": {f"w{i}": 1 for i in range(1000)}}),
        json.dumps({"1_x": {"two\nlines": 1, "\ud800": 1, " ": 1}}),
        json.dumps({"1_x": "word", "2_x": ["a"], "3_x": None}),
        "9" * 5000,
        json.dumps({"1_x": {"x": 1}}) + " " * 5_000_000,
    ],
    ids=range(8),
)
def test_trigger_words_are_few_and_short(tmp_path: Path, tags: str) -> None:
    """However many and long the tags are, and whatever else stands in their place."""
    found = file.inspect(_save(tmp_path, ss_tag_frequency=tags, training_info=tags[:400_000]), "x")
    assert len(found.trigger_words) <= MAX_TRIGGERS
    assert all(len(word) <= MAX_TRIGGER and word.isprintable() for word in found.trigger_words)
    json.dumps(found.trigger_words, ensure_ascii=False).encode()


def test_training_claims_are_bounded(tmp_path: Path) -> None:
    """They are shown to everybody who asks what there is."""
    claims = {
        "ss_base_model_version": "x" * 10_000,
        "ss_output_name": "\ud800\n",
        "ss_network_alpha": "4",
    }
    found = file.inspect(_save(tmp_path, **claims), "x")
    assert all(len(value) <= 200 and value.isprintable() for value in found.training.values())
    json.dumps(dict(found.training), ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "text",
    [
        "scale = nan",
        "scale = inf",
        "scale = 4.5",
        "scale = true",
        f"trigger = '{'x' * (MAX_TRIGGER + 1)}'",
        'trigger = "two\\nlines"',
        "trigger = ['a']",
        "a = " + "[" * 10_000,
        "\x00",
        "# " + "x" * 100_000,
    ],
    ids=range(10),
)
def test_odd_defaults_are_refused_by_name(tmp_path: Path, text: str) -> None:
    """As an error of that LoRA; the list goes on."""
    _save(tmp_path, "a.safetensors")
    _save(tmp_path, "b.safetensors")
    (tmp_path / "a.toml").write_text(text)
    library = LoraLibrary(tmp_path)
    with pytest.raises(LoraError, match=r"a\.toml"):
        library.find(LoraSpec("a.safetensors"))
    rows = {row["name"]: row for row in library.entries()}
    assert "a.toml" in rows["a.safetensors"]["error"]
    assert "error" not in rows["b.safetensors"]


# -- the folder (17, 18, 19, 27) ---------------------------------------------------------------


def test_one_bad_entry_hides_no_other(tmp_path: Path) -> None:
    """Links to nowhere and in circles, folders, odd headers, names that are no text."""
    folder, outside = tmp_path / "loras", tmp_path / "outside.safetensors"
    folder.mkdir()
    _save(folder, "good.safetensors")
    outside.write_bytes(b"x")
    (folder / "dangling.safetensors").symlink_to(folder / "nowhere")
    (folder / "circle.safetensors").symlink_to(folder / "circle.safetensors")
    (folder / "out.safetensors").symlink_to(outside)
    (folder / "folder.safetensors").mkdir()
    (folder / "junk.safetensors").write_bytes(b"junk")
    _raw(folder / "odd.safetensors", b'{"__metadata__":{"a":[1]}}')
    (folder / os.fsdecode(b"\xff.safetensors")).write_bytes(b"x")
    rows = LoraLibrary(folder).entries()
    json.dumps(rows, ensure_ascii=False).encode()
    fine = [row["name"] for row in rows if "error" not in row]
    assert fine == ["good.safetensors"]
    assert len(rows) >= 6
    assert not any(str(tmp_path) in str(row) for row in rows)


def test_a_pipe_or_a_device_keeps_nobody(tmp_path: Path) -> None:
    """As a LoRA, as its defaults, or in its place once it was inspected."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    path = _save(tmp_path, "a.safetensors")
    _save(tmp_path, "b.safetensors")
    os.mkfifo(tmp_path / "b.toml")
    library, found = LoraLibrary(tmp_path), file.inspect(path, "a")
    rows = {row["name"]: row for row in library.entries()}
    assert [name for name, row in rows.items() if "error" not in row] == ["a.safetensors"]
    assert "it is no regular file" in rows["b.safetensors"]["error"]
    for name in ("pipe.safetensors", "zero.safetensors", "b.safetensors"):
        with pytest.raises(LoraError):
            library.find(LoraSpec(name))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(LoraUnavailable, match="no regular file"):
        _loaded(found)


def test_a_long_list_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of more files than are kept in memory whole."""
    whole = _save(tmp_path).read_bytes()
    for number in range(300):
        (tmp_path / f"{number}.safetensors").write_bytes(whole)
    library = LoraLibrary(tmp_path)
    first = library.entries()
    monkeypatch.setattr(file, "inspect", lambda *_: pytest.fail("read again"))
    assert library.entries() == first
    assert len(first) == 301


def test_two_uploads_of_one_name(tmp_path: Path) -> None:
    """The quicker one is kept, the other is told; nothing is left of it."""
    data = _save(tmp_path, "made").read_bytes()
    folder = tmp_path / "loras"
    folder.mkdir()
    library, both, said = LoraLibrary(folder), threading.Barrier(2), []

    def chunks() -> Iterator[bytes]:
        both.wait(5)
        yield data

    def add() -> None:
        try:
            said.append(library.add("a.safetensors", chunks())["name"])
        except InvalidRequest as error:
            said.append("already" in str(error))

    threads = [threading.Thread(target=add) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, said)) == ["True", "a.safetensors"]
    assert [path.name for path in folder.iterdir()] == ["a.safetensors"]


def test_what_a_killed_upload_left_is_deleted(tmp_path: Path) -> None:
    """A day later, with the next upload; it is never listed."""
    data = _save(tmp_path, "made").read_bytes()
    folder = tmp_path / "loras"
    folder.mkdir()
    (folder / ".left.part").write_bytes(b"x")
    os.utime(folder / ".left.part", (1, 1))
    library = LoraLibrary(folder)
    assert library.entries() == []
    library.add("a.safetensors", [data])
    assert [path.name for path in folder.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "a.toml", "../out.safetensors", "sub", "a\x00.safetensors", ""],
)
def test_only_loras_are_deleted(tmp_path: Path, name: str) -> None:
    """No other file of the folder, and none outside."""
    folder = tmp_path / "loras"
    (folder / "sub").mkdir(parents=True)
    for path in (folder / "a.safetensors", folder / "notes.txt", folder / "a.toml"):
        path.write_bytes(b"x")
    (tmp_path / "out.safetensors").write_bytes(b"x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LoraError):
        LoraLibrary(folder).remove(name)
    assert sorted(tmp_path.rglob("*")) == before


def test_deleting_a_link_leaves_what_it_leads_to(tmp_path: Path) -> None:
    """Inside the folder; one that leads out of it is not touched."""
    target = _save(tmp_path, "target.safetensors")
    (tmp_path / "link.safetensors").symlink_to(target)
    LoraLibrary(tmp_path).remove("link.safetensors")
    assert target.exists()
    assert not os.path.lexists(tmp_path / "link.safetensors")


@pytest.mark.parametrize(
    "name", ["a.safetensors\n", "ä" * 110 + ".safetensors", "a\x00.safetensors", 5, None, ["a"]]
)
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: object) -> None:
    """As the caller's fault in the field `name`."""
    with pytest.raises(InvalidRequest) as caught:
        LoraLibrary(tmp_path).add(name, [b""])  # type: ignore[arg-type]
    assert caught.value.field == "name"


def test_a_disk_that_takes_nothing_is_not_the_callers_fault(tmp_path: Path) -> None:
    """A folder that is gone stands for one that is full or read-only."""
    folder = tmp_path / "loras"
    folder.mkdir()
    library = LoraLibrary(folder)
    folder.rmdir()
    with pytest.raises(LoraUnavailable, match="cannot be written"):
        library.add("a.safetensors", [b"x"])


@contextmanager
def _disk_that_takes(size: int) -> Iterator[None]:
    """No file of this process grows above `size` bytes, as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_under_an_upload(tmp_path: Path) -> None:
    """It is told, may be tried again, and leaves nothing behind."""
    data = _save(tmp_path, "made").read_bytes()
    folder = tmp_path / "loras"
    folder.mkdir()
    library = LoraLibrary(folder)
    with (
        _disk_that_takes(len(data) - 1),
        pytest.raises(LoraUnavailable, match=r"'a\.safetensors' cannot be written"),
    ):
        library.add("a.safetensors", [data[:100], data[100:]])
    assert not list(folder.iterdir())
    assert library.add("a.safetensors", [data])["name"] == "a.safetensors"


def test_a_disk_that_fills_up_under_a_download(tmp_path: Path) -> None:
    """The same; and once there is room, the next try takes what had come."""
    tensors, _ = _plain(rank=2000)
    data = loras.write(tmp_path / "made", tensors).read_bytes()
    with servers.serve(lambda _: (200, {"etag": '"1"'}, data)) as server:
        fetcher = Fetcher(frozenset({urlsplit(server.url).netloc}))
        library = LoraLibrary(None, Store(tmp_path / "cache", 1e9, grace=60), fetcher)
        spec = LoraSpec(f"{server.url}/anna.safetensors")
        with (
            _disk_that_takes(len(data) // 2),
            pytest.raises(LoraUnavailable, match=r"anna\.safetensors' cannot be stored"),
        ):
            library.find(spec)
        assert library.find(spec).rank == 2000
        assert "range" in server.seen[-1].headers
    assert not list((tmp_path / "cache" / "partial").iterdir())


def test_a_fault_of_klein_is_that_of_one_lora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever breaks while a LoRA is looked for, `lora_error: continue` can go on."""
    _save(tmp_path)

    def breaks(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(file, "inspect", breaks)
    with pytest.raises(LoraError, match="ZeroDivisionError"):
        LoraLibrary(tmp_path).find(LoraSpec("x.safetensors"))
