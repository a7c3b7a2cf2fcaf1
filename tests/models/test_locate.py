import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from klein.models import locate
from klein.models.locate import Place, find, is_whole
from klein.sources import hub
from klein.sources.hub import Problem
from tests.support import servers

REPO = "black-forest-labs/FLUX.2-klein-base-4B"
COMMIT = "c" * 40


def _files() -> dict[str, bytes]:
    """A whole model in small: one part in two shards, and the copy that nobody needs."""
    index = {
        "_class_name": "Flux2KleinPipeline",
        "is_distilled": False,
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "image_encoder": [None, None],
    }
    geometry = {
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "num_layers": 5,
        "num_single_layers": 20,
    }
    shards = {
        "weight_map": {"a": "x-00001-of-00002.safetensors", "b": "x-00002-of-00002.safetensors"}
    }
    return {
        "model_index.json": json.dumps(index).encode(),
        "transformer/config.json": json.dumps(geometry).encode(),
        "transformer/x.safetensors.index.json": json.dumps(shards).encode(),
        "transformer/x-00001-of-00002.safetensors": b"1" * 1000,
        "transformer/x-00002-of-00002.safetensors": b"2" * 1000,
        "tokenizer/vocab.json": b"{}",
        "single-file-copy.safetensors": b"3" * 5000,
    }


def _model(folder: Path, without: str = "") -> Path:
    for name, data in _files().items():
        if name != without:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    return folder


def _cache(root: Path, commit: str = COMMIT, repo: str = REPO, **kwargs: str) -> Path:
    entry = root / f"models--{repo.replace('/', '--')}"
    _model(entry / "snapshots" / commit, **kwargs)
    (entry / "refs").mkdir(exist_ok=True)
    (entry / "refs" / "main").write_text(commit)
    return entry


def _places(tmp_path: Path) -> tuple[Place, ...]:
    rows = (("cached", False), ("volume", True), ("hub", False))
    return tuple(Place(name, tmp_path / name, plain) for name, plain in rows)


def test_the_first_place_wins(tmp_path: Path) -> None:
    """RunPod's cached model, then the volume, then the Hugging Face cache."""
    found = []
    for step in (
        lambda: _cache(tmp_path / "hub"),
        lambda: _model(tmp_path / "volume" / "FLUX.2-klein-base-4B"),
        lambda: _cache(tmp_path / "cached"),
    ):
        step()
        place = find(REPO, None, _places(tmp_path))
        assert place is not None
        found.append(place.place)
    assert found == ["hub", "volume", "cached"]
    assert find("someone/else", None, _places(tmp_path)) is None


def test_runpods_order_is_the_one_promised() -> None:
    """RunPod's cached model before its volume, and the cache that a download fills last."""
    names = [place.name for place in locate.places()]
    assert names[0] == "RunPod's cached model"
    assert set(names[1:-1]) == {"the network volume"}
    assert names[-1] == "the Hugging Face cache"


@pytest.mark.parametrize("missing", [*_files()][:-1])
def test_half_a_model_is_not_there(tmp_path: Path, missing: str) -> None:
    """Whatever is missing; only the copy beside the parts is not needed."""
    assert not is_whole(_model(tmp_path / "half", without=missing))
    assert is_whole(_model(tmp_path / "whole", without="single-file-copy.safetensors"))
    _cache(tmp_path / "cached", without=missing)
    _cache(tmp_path / "hub")
    found = find(REPO, None, _places(tmp_path))
    assert found is not None
    assert found.place == "hub"


def test_a_link_to_nothing_is_missing(tmp_path: Path) -> None:
    """As an interrupted copy of a cache leaves it."""
    folder = _model(tmp_path / "model")
    (folder / "transformer/x-00002-of-00002.safetensors").unlink()
    (folder / "transformer/x-00002-of-00002.safetensors").symlink_to(tmp_path / "nowhere")
    assert not is_whole(folder)


def test_case_does_not_matter(tmp_path: Path) -> None:
    """RunPod's folders do not always have the Hub's spelling."""
    _cache(tmp_path / "cached", repo=REPO.lower())
    assert find(REPO, None, _places(tmp_path)) is not None
    _model(tmp_path / "volume" / "Me" / "MyTune")
    assert find("me/mytune", None, _places(tmp_path)) is not None


def test_a_revision_is_that_revision(tmp_path: Path) -> None:
    """A commit or a ref of the cache; a plain folder has none, so it is passed over."""
    old = "a" * 40
    _cache(tmp_path / "cached", old)
    entry = _cache(tmp_path / "cached")
    (entry / "refs" / "v1").write_text(old)
    _model(tmp_path / "volume" / "FLUX.2-klein-base-4B")
    places = _places(tmp_path)
    commits = {None: COMMIT, "v1": old, old: old, COMMIT: COMMIT}
    for revision, commit in commits.items():
        found = find(REPO, revision, places)
        assert found is not None
        assert found.revision == commit
    assert find(REPO, "v2", places) is None


def test_a_cache_without_refs(tmp_path: Path) -> None:
    """The newest snapshot."""
    old = _cache(tmp_path / "cached", "a" * 40) / "snapshots" / ("a" * 40)
    entry = _cache(tmp_path / "cached")
    (entry / "refs" / "main").unlink()
    os.utime(old, (1, 1))
    found = find(REPO, None, _places(tmp_path))
    assert found is not None
    assert found.revision == COMMIT


SCRIPT = """
import logging, sys
from klein.models import locate, plan as planning
from klein.errors import ModelUnavailable
from klein.models.machine import Device, Machine
from klein.settings import Settings
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
locate.LOG_EVERY = 0.05
if "small" in sys.argv:
    locate.shutil.disk_usage = lambda _: type("Usage", (), {"free": 10})
big = 141 * 10**9
def plan():
    return planning.plan(
        Settings.from_env({"MODEL_ID": "klein-base-4B"}),
        Machine((Device("cuda", "G", big, big),), big, big),
    )
first = plan()
print("first", first.found_in, first.download)
try:
    found = locate.download(first.source, first.revision, None)
    print("whole", locate.is_whole(found.folder), sorted(x.name for x in found.folder.iterdir()))
    second = plan()
    print("second", second.found_in, second.download, second.revision)
except ModelUnavailable as error:
    print("refused", error)
"""


def _download(tmp_path: Path, *argv: str, **env: str) -> str:
    files = _files()
    with servers.serve(servers.hub({REPO: files})) as server:
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, *argv],
            env={
                **os.environ,
                "HF_ENDPOINT": server.url,
                "HF_HOME": str(tmp_path),
                "HF_HUB_OFFLINE": "0",
                **env,
            },
            capture_output=True,
            text=True,
            check=True,
        )
    return run.stdout


def test_a_download_is_the_last_place(tmp_path: Path) -> None:
    """The real Hub client against a Hub on this machine: once, whole, without the copy."""
    said = _download(tmp_path)
    assert "first the Hugging Face Hub, to be downloaded True" in said, said
    assert f"downloading {REPO}" in said
    assert "whole True ['model_index.json', 'tokenizer', 'transformer']" in said
    assert f"second the Hugging Face cache False {COMMIT}" in said


def test_a_disk_too_small_is_said_before(tmp_path: Path) -> None:
    """With both numbers and the ways out."""
    said = _download(tmp_path, "small")
    assert "refused" in said
    assert "larger disk or volume" in said
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_cache_that_cannot_be_written() -> None:
    """Names the folder and the user, since a volume mostly belongs to somebody else."""
    failed = hub.failure(PermissionError(13, "no", "/cache"))
    assert failed.problem is Problem.UNWRITABLE
    assert f"that user {os.getuid()} can write, or set HF_HOME" in str(failed)
    assert hub.failure(ConnectionError()).problem is Problem.UNREACHABLE
