from pathlib import Path
from urllib.parse import urlsplit

import pytest

from klein.errors import LoraError
from klein.lora.library import LoraLibrary, Tokens
from klein.lora.spec import LoraSpec
from klein.settings import Secret
from klein.sources import files, reference
from klein.sources.cache import Store
from klein.sources.fetch import MAX_BYTES, Fetcher
from klein.sources.reference import BadReference, CivitaiFile, HubFile, LocalFile, UrlFile
from tests.support import loras, servers


def _file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors, metadata = loras.ai_toolkit({"single_blocks.0.linear1": (72, 8)})
    return loras.write(path, tensors, metadata)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (LoraSpec("a.safetensors"), LocalFile("a.safetensors")),
        (LoraSpec("sub/a.safetensors"), LocalFile("sub/a.safetensors")),
        (LoraSpec("owner/repo"), HubFile("owner/repo", None, None)),
        (LoraSpec("owner/repo@v1"), HubFile("owner/repo", "v1", None)),
        (LoraSpec("https://x.org/a?b=c"), UrlFile("https://x.org/a?b=c", None)),
        (LoraSpec(f"https://x.org/a#sha256={'A' * 64}"), UrlFile("https://x.org/a", "a" * 64)),
        (LoraSpec("civitai:12"), CivitaiFile(12)),
        (LoraSpec("https://civitai.com/models/1?modelVersionId=34"), CivitaiFile(34)),
        (LoraSpec("https://civitai.com/api/download/models/34?token=x"), CivitaiFile(34)),
        (
            LoraSpec("owner/repo", revision="v2", weight_name="w.safetensors"),
            HubFile("owner/repo", "v2", "w.safetensors"),
        ),
    ],
)
def test_references(spec: LoraSpec, expected: object) -> None:
    """A suffix makes a file, a slash a repository."""
    assert reference.parse(spec.path, spec.weight_name, spec.revision) == expected


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("https://civitai.com/models/12", "several versions"),
        ("https://x.org/a#sha256=12", "64 hexadecimal"),
        ("a.pt", "only .safetensors"),
        ("just-a-name", "is no .safetensors file"),
        ("a/b/c", "civitai:VERSION"),
    ],
)
def test_what_is_no_reference_is_said(path: str, says: str) -> None:
    """With what would be one."""
    with pytest.raises(BadReference, match=says):
        reference.parse(path)


def test_local_files_are_found(tmp_path: Path) -> None:
    """By their name below the folder; a missing one is answered with what is there."""
    _file(tmp_path / "loras" / "a.safetensors")
    _file(tmp_path / "loras" / "sub" / "b.safetensors")
    library = LoraLibrary(tmp_path / "loras", None)
    assert library.find(LoraSpec("sub/b.safetensors")).name == "sub/b.safetensors"
    assert library.names() == ["a.safetensors", "sub/b.safetensors"]
    with pytest.raises(LoraError, match=r"holds a\.safetensors, sub/b\.safetensors"):
        library.find(LoraSpec("c.safetensors"))
    with pytest.raises(LoraError, match="KLEIN_LORA_DIR"):
        LoraLibrary(None, None).find(LoraSpec("a.safetensors"))


def test_there_is_no_way_out_of_the_folder(tmp_path: Path) -> None:
    """Not through dots, absolute paths or links, and the answer shows no path."""
    inside, outside = tmp_path / "loras", _file(tmp_path / "secret.safetensors")
    inside.mkdir()
    (inside / "link.safetensors").symlink_to(outside)
    (inside / "dir").symlink_to(tmp_path)
    library = LoraLibrary(inside, None)
    for name in (
        "../secret.safetensors",
        "dir/secret.safetensors",
        "link.safetensors",
        str(outside),
    ):
        with pytest.raises(LoraError, match="outside the LoRA folder") as caught:
            library.find(LoraSpec(name))
        assert str(caught.value).count(str(tmp_path)) == name.count(str(tmp_path))


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """A retrained LoRA under the same name is another LoRA."""
    path = _file(tmp_path / "a.safetensors")
    library = LoraLibrary(tmp_path, None)
    first = library.find(LoraSpec("a.safetensors")).sha256
    tensors, metadata = loras.ai_toolkit({"single_blocks.0.linear1": (72, 8)}, rank=8)
    loras.write(path, tensors, metadata)
    assert library.find(LoraSpec("a.safetensors")).sha256 != first


@pytest.mark.parametrize(
    ("path", "weight_name", "revision", "token", "says"),
    [
        ("me/one", "", "", "", "found 4"),
        ("me/one@main", "", "", "", "found 4"),
        ("me/one", "", "v9", "", "has no revision 'v9'"),
        ("me/two", "", "", "", "weight_name (a.safetensors, b.safetensors)"),
        ("me/two", "b.safetensors", "", "", "found 4"),
        ("me/two", "c.safetensors", "", "", "has no file 'c.safetensors'"),
        ("me/none", "", "", "", "check the name, set HF_TOKEN"),
        ("me/private", "", "", "", "is gated"),
        ("me/private", "", "", "hf_good", "found 4"),
    ],
)
def test_hub_files(
    tmp_path: Path, path: str, weight_name: str, revision: str, token: str, says: str
) -> None:
    """The real Hub client against a Hub on this machine; every refusal has its way out."""
    data = _file(tmp_path / "x.safetensors").read_bytes()
    repos = {
        "me/one": {"README.md": b"", "lora.safetensors": data},
        "me/two": {"a.safetensors": data, "b.safetensors": data},
        "me/private": {"lora.safetensors": data},
    }
    with servers.serve(servers.hub(repos, gated=("me/private",))) as hub:
        said = _find(hub, tmp_path, path, weight_name, revision, token)
    assert says in said
    assert "hf_good" not in said


def _library(hub: servers.Server, tmp_path: Path, token: str = "") -> LoraLibrary:
    """A library that takes `hub`, and its storage under another name, for the Hub."""
    hosts = {urlsplit(hub.url).netloc, f"localhost:{urlsplit(hub.url).port}"}
    tokens = Tokens(Secret(token) if token else None)
    store = Store(tmp_path / "cache", 1e10, grace=60)
    return LoraLibrary(None, store, Fetcher(frozenset(hosts)), tokens, hub=hub.url)


def _find(
    hub: servers.Server, tmp_path: Path, path: str, weight_name: str, revision: str, token: str
) -> str:
    """What is found or refused of path, weight_name, revision and token; the store is kept."""
    spec = LoraSpec(path, weight_name=weight_name or None, revision=revision or None)
    try:
        return f"found {_library(hub, tmp_path, token).find(spec).rank}"
    except LoraError as error:
        return f"refused as {error.code}: {error}"


def _asked(hub: servers.Server) -> list[str]:
    """What was asked about me/one: of the Hub's list, for a file, and from its storage."""
    kinds = {"/api/": "list", "/resolve/": "file", "/storage/": "storage"}
    return [next(kind for mark, kind in kinds.items() if mark in seen.path) for seen in hub.seen]


@pytest.mark.parametrize(
    ("told", "says", "fetched"),
    [
        (MAX_BYTES, "lora_unavailable", True),  # it is smaller, and sizes are compared
        (MAX_BYTES + 1, f"offers {MAX_BYTES + 1} bytes; {MAX_BYTES} are the most", False),
        (None, "found 4", True),  # bounded by what comes
    ],
)
def test_hub_files_are_bounded(tmp_path: Path, told: int | None, says: str, fetched: bool) -> None:
    """By the size the Hub tells, before a byte is fetched; then by the bytes that come."""
    data = _file(tmp_path / "x.safetensors").read_bytes()
    repos = {"me/one": {"lora.safetensors": data}}
    with servers.serve(servers.hub(repos, told={"me/one": told})) as hub:
        assert says in _find(hub, tmp_path, "me/one", "", "", "")
    assert ("file" in _asked(hub)) is fetched


def test_a_hub_file_at_hand_costs_one_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is still the newest, once in five minutes; with a commit not even that, however
    large it is; and when the Hub is away, what there is must do."""
    data = _file(tmp_path / "x.safetensors").read_bytes()
    repos, told = {"me/one": {"lora.safetensors": data}}, dict[str, int | None]()
    with servers.serve(servers.hub(repos, told=told)) as hub:
        first, later, commit = ["list", "file", "storage"], ["list"], "c" * 40
        for fresh, revision, asked in (
            (300, "", first),
            (300, "", []),
            (-1, "", later),
            (-1, commit, []),
        ):
            monkeypatch.setattr(files, "FRESH", fresh)
            hub.seen.clear()
            assert "found 4" in _find(hub, tmp_path, "me/one", "lora.safetensors", revision, "")
            assert _asked(hub) == asked
            told["me/one"] = MAX_BYTES + 1
    assert "found 4" in _find(hub, tmp_path, "me/one", "lora.safetensors", "", "")
