import os
import subprocess
import sys
from pathlib import Path

import pytest

from klein.errors import LoraError
from klein.lora.library import LoraLibrary
from klein.lora.spec import LoraSpec
from klein.sources import reference
from klein.sources.fetch import MAX_BYTES
from klein.sources.reference import CivitaiFile, HubFile, LocalFile, UrlFile
from tests import loras, servers


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
    with pytest.raises(LoraError, match=says):
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


SCRIPT = """
import sys
from klein.errors import LoraError
from klein.lora.library import LoraLibrary, Tokens
from klein.lora.spec import LoraSpec
from klein.settings import Secret
tokens = Tokens(Secret(sys.argv[4]) if sys.argv[4] else None)
try:
    spec = LoraSpec(sys.argv[1], weight_name=sys.argv[2] or None, revision=sys.argv[3] or None)
    print("found", LoraLibrary(None, tokens=tokens).find(spec).rank)
except LoraError as error:
    print("refused", error)
"""


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


def _find(hub: servers.Server, tmp_path: Path, *argv: str) -> str:
    """What SCRIPT says of path, weight_name, revision and token; its cache is kept."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *argv],
        env={
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout + run.stderr


def _asked(hub: servers.Server) -> list[str]:
    """The methods of what was asked about me/one."""
    return [seen.method for seen in hub.seen if "/me/one/" in seen.path]


@pytest.mark.parametrize(
    ("told", "says", "fetched"),
    [
        (MAX_BYTES, "could not be fetched", True),  # it is smaller, and Hub clients compare
        (MAX_BYTES + 1, f"the Hub offers {MAX_BYTES + 1} bytes; {MAX_BYTES} are the most", False),
        (None, "the Hub tells no size of 'lora.safetensors': name its https address", False),
    ],
)
def test_hub_files_are_bounded(tmp_path: Path, told: int | None, says: str, fetched: bool) -> None:
    """By the size the Hub tells, before a byte is fetched; what it tells no size of is refused."""
    data = _file(tmp_path / "x.safetensors").read_bytes()
    repos = {"me/one": {"lora.safetensors": data}}
    with servers.serve(servers.hub(repos, told={"me/one": told})) as hub:
        assert says in _find(hub, tmp_path, "me/one", "lora.safetensors", "", "")
    assert ("GET" in _asked(hub)) is fetched


def test_a_hub_file_at_hand_costs_one_question(tmp_path: Path) -> None:
    """Whether it is still the newest; with a commit not even that, however large it is."""
    data = _file(tmp_path / "x.safetensors").read_bytes()
    repos, told = {"me/one": {"lora.safetensors": data}}, dict[str, int | None]()
    with servers.serve(servers.hub(repos, told=told)) as hub:
        for revision, asked in (("", ["HEAD", "HEAD", "GET"]), ("", ["HEAD"]), ("c" * 40, [])):
            hub.seen.clear()
            assert "found 4" in _find(hub, tmp_path, "me/one", "lora.safetensors", revision, "")
            assert _asked(hub) == asked
            told["me/one"] = MAX_BYTES + 1
