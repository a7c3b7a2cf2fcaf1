"""KLEIN_TRANSFORMER's file: found, recognised by its header where it lies, then fetched."""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants

from klein.errors import ModelUnavailable
from klein.models import transformer_file
from klein.models.identify import NANO_FOLDER
from klein.models.machine import Machine
from klein.models.plan import fetched, plan
from klein.settings import Settings
from tests.support import servers

FILE = NANO_FOLDER / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
DATA = FILE.read_bytes()
SHA256 = hashlib.sha256(DATA).hexdigest()
MACHINE = Machine((), 64 * 10**9, 100 * 10**9)


def settings(cache: Path, transformer: str, server: servers.Server | None = None) -> Settings:
    port = urlsplit(server.url).port if server else 0
    return Settings.from_env(
        {
            "MODEL_ID": "nano",
            "KLEIN_TRANSFORMER": transformer,
            "KLEIN_TRANSFORMER_CACHE": str(cache),
            "KLEIN_FETCH_HOSTS": f"127.0.0.1:{port},localhost:{port}",
        }
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[servers.Server]:
    """The Hub with one repository."""
    with servers.serve(servers.hub({"owner/fine": {"klein/a.safetensors": DATA}})) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


def test_nothing_is_set(tmp_path: Path) -> None:
    """Then the model's own transformer is used."""
    assert transformer_file.find(settings(tmp_path, "")) is None


def test_a_file_on_the_hub(tmp_path: Path, hub: servers.Server) -> None:
    """It is planned with by its header and by the hash that the Hub tells, fetched once when klein
    loads, and found without a request when it starts again."""
    named = settings(tmp_path, "owner/fine:klein/a.safetensors@main", hub)
    planned = plan(named, MACHINE)
    assert planned.checkpoint is not None
    assert planned.checkpoint.files == ()
    assert planned.checkpoint.sha256 == SHA256
    assert planned.notes[0].startswith("transformer: owner/fine:klein/a.safetensors@main, bfloat16")
    loaded = fetched(planned, named).checkpoint
    assert loaded is not None
    assert loaded.files[0].read_bytes() == DATA
    asked = len(hub.seen)
    again = transformer_file.find(named)
    assert again is not None
    assert again.files == loaded.files
    assert again.sha256 == SHA256
    assert len(hub.seen) == asked


def test_a_download_that_breaks_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From the byte where it stopped, with its progress in the log."""
    caplog.set_level(logging.INFO)
    half = len(DATA) // 2

    def answer(seen: servers.Seen) -> servers.Answer:
        asked = seen.headers.get("range", "")
        told = {"etag": '"x"', "connection": "close"}
        if asked == "bytes=0-1048575":
            span = f"bytes 0-1048575/{len(DATA)}"
            return 206, told | {"content-range": span}, DATA[: 1024**2]
        if not asked:
            return 200, told | {"content-length": str(len(DATA))}, DATA[:half]
        start = int(asked.removeprefix("bytes=").rstrip("-"))
        span = f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"
        return 206, told | {"content-range": span}, DATA[start:]

    with servers.serve(answer) as server:
        named = settings(tmp_path, f"{server.url}/a.safetensors?token=abc", server)
        found = transformer_file.find(named)
        assert found is not None
        assert found.files == ()
        loaded = transformer_file.fetch(named, found)
    assert loaded.files[0].read_bytes() == DATA
    assert f"bytes={half}-" in [seen.headers.get("range") for seen in server.seen]
    assert "going on in 1 s" in caplog.text
    assert "GB fetched" in caplog.text
    assert "abc" not in caplog.text


def test_what_is_no_transformer_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    """By the first megabyte."""
    lora = (NANO_FOLDER / "loras" / "zibbo.safetensors").read_bytes()
    with servers.serve(lambda _: (200, {}, lora)) as server:
        named = settings(tmp_path, f"{server.url}/zibbo.safetensors", server)
        with pytest.raises(ModelUnavailable, match="is a LoRA: name it in") as caught:
            transformer_file.find(named)
        assert len(server.seen) == 1
    assert caught.value.field == "KLEIN_TRANSFORMER"


@pytest.mark.parametrize(
    ("transformer", "says"),
    [
        ("nowhere.safetensors", r"nowhere\.safetensors cannot be read \(No such file"),
        ("owner/fine", r"name the file too, as owner/fine:NAME\.safetensors"),
        ("owner/fine:b.safetensors", r"has no file 'b\.safetensors'"),
        ("owner/none:a.safetensors", "is not on the Hub, or private"),
        ("a.gguf", "is in GGUF, which klein does not read: use the bf16 file"),
        ("model.ckpt", r"only \.safetensors files are read"),
        ("owner/fine:../a.safetensors", r"no \.safetensors file of it"),
        ("https://10.0.0.1/a.safetensors", "inside this network"),
    ],
)
def test_what_cannot_be_had(
    tmp_path: Path, hub: servers.Server, transformer: str, says: str
) -> None:
    """One sentence, for the setting that it is about."""
    with pytest.raises(ModelUnavailable, match=says) as caught:
        transformer_file.find(settings(tmp_path, transformer, hub))
    assert caught.value.field == "KLEIN_TRANSFORMER"
    assert str(caught.value).count("KLEIN_TRANSFORMER:") == 1
