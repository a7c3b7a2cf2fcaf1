import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from klein.errors import ModelUnavailable
from klein.models import plan as planning
from klein.models import speed
from klein.models.catalog import GB, MODELS
from klein.models.machine import Device, Machine
from klein.settings import Settings
from tests.support import servers

NINE = MODELS["klein-base-9B"]


def _machine(gpu: float = 0, memory: float = 64) -> Machine:
    gpus = (Device("cuda", "GPU", int(gpu * GB), int(gpu * GB)),) if gpu else ()
    return Machine(gpus, int(memory * GB), 100 * GB)


def _settings(**values: str) -> Settings:
    return Settings.from_env(values)


@pytest.mark.parametrize(
    ("gpu", "offload"),
    [(141, "none"), (48, "none"), (32, "model"), (24, "model"), (12, "sequential")],
)
def test_auto_offload_follows_free_memory(gpu: float, offload: str) -> None:
    """Resident wherever it fits: offload costs four times the time."""
    chosen, why = planning.place(_settings(), _machine(gpu), NINE, "cuda")
    assert chosen == offload
    assert f"{gpu:.1f} GB free" in why


@pytest.mark.parametrize(
    ("machine", "settings", "says"),
    [
        (_machine(4), {}, "needs 6.0 GB of GPU memory"),
        (_machine(24), {"KLEIN_OFFLOAD": "none"}, "KLEIN_OFFLOAD=auto would decide"),
        (_machine(24, memory=16), {}, "of weights in main memory"),
    ],
)
def test_too_little_memory_stops_before_loading(
    machine: Machine, settings: dict[str, str], says: str
) -> None:
    """With the numbers and the way out."""
    with pytest.raises(ModelUnavailable, match="GB") as caught:
        planning.place(_settings(**settings), machine, NINE, "cuda")
    assert says in str(caught.value)


def _folder(tmp_path: Path, **config: object) -> Path:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "Flux2KleinPipeline"}))
    whole = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 2,
    }
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(whole | config))
    return tmp_path


def test_a_folder_is_known_by_its_geometry(tmp_path: Path) -> None:
    """A local copy of the 9B model needs a GPU as the Hub's does."""
    small = _folder(tmp_path)
    plan = planning.plan(_settings(MODEL_ID=str(small)), _machine())
    assert (plan.device, plan.spec.hidden, plan.local) == ("cpu", 32, True)


def test_a_local_9b_needs_a_gpu(tmp_path: Path) -> None:
    """Said in one sentence with both ways out."""
    nine = {
        "num_attention_heads": 32,
        "attention_head_dim": 128,
        "num_layers": 8,
        "num_single_layers": 24,
    }
    folder = _folder(tmp_path, **nine)
    with pytest.raises(ModelUnavailable, match="needs an NVIDIA GPU") as caught:
        planning.plan(_settings(MODEL_ID=str(folder)), _machine())
    assert "MODEL_ID=nano" in str(caught.value)
    assert planning.plan(_settings(MODEL_ID=str(folder)), _machine(141)).device == "cuda"
    with pytest.raises(ModelUnavailable, match="KLEIN_DEVICE=cuda"):
        planning.plan(_settings(MODEL_ID=str(folder), KLEIN_DEVICE="cuda"), _machine())


@pytest.mark.parametrize(
    ("model_id", "says"),
    [
        ("./nowhere", "there is no folder './nowhere'"),
        ("klein-base-9", "did you mean 'klein-base-9B'"),
    ],
)
def test_a_missing_folder_is_said(model_id: str, says: str) -> None:
    """And what the name may have meant."""
    with pytest.raises(ModelUnavailable, match="MODEL_ID") as caught:
        planning.plan(_settings(MODEL_ID=model_id), _machine())
    assert says in str(caught.value)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    """An empty folder, and another pipeline's."""
    with pytest.raises(ModelUnavailable, match=r"model_index\.json is missing"):
        planning.plan(_settings(MODEL_ID=str(tmp_path)), _machine())
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ModelUnavailable, match="is a FluxPipeline"):
        planning.plan(_settings(MODEL_ID=str(tmp_path)), _machine())


SCRIPT = """
import sys
from klein.models import plan as planning
from klein.models import speed
from klein.errors import ModelUnavailable
from klein.models.machine import Device, Machine
from klein.settings import Settings
names = ("MODEL_ID", "HF_TOKEN", "MODEL_REVISION")
settings = Settings.from_env(dict(zip(names, sys.argv[1:])))
big = 141 * 10**9
try:
    plan = planning.plan(settings, Machine((Device("cuda", "GPU", big, big),), big, big))
    print("planned", plan.source, plan.spec.name, plan.offload)
except ModelUnavailable as error:
    print("refused", error)
"""
BASE = "black-forest-labs/FLUX.2-klein-base-9B"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((BASE, "", ""), "is gated: accept its license there and set HF_TOKEN"),
        ((BASE, "hf_bad", ""), "with the account of your HF_TOKEN"),
        ((BASE, "hf_good", ""), f"planned {BASE} klein-base-9B none"),
        ((BASE.lower(), "hf_good", ""), f"planned {BASE} klein-base-9B none"),
        ((BASE, "hf_good", "v9"), "has no revision 'v9'"),
        (("me/finetune", "", ""), "planned me/finetune klein-base-9B none"),
        (("me/missing", "", ""), "not on the Hub, or private"),
    ],
)
def test_hub_models_are_checked_before_they_are_fetched(
    tmp_path: Path, argv: tuple[str, str, str], says: str
) -> None:
    """The real Hub client against a Hub on this machine: two small files decide."""
    index = json.dumps({"_class_name": "Flux2KleinPipeline"}).encode()
    config = json.dumps(
        {
            "num_attention_heads": 32,
            "attention_head_dim": 128,
            "num_layers": 8,
            "num_single_layers": 24,
        }
    ).encode()
    files = {"model_index.json": index, "transformer/config.json": config}
    with servers.serve(servers.hub({BASE: files, "me/finetune": files}, gated=(BASE,))) as hub:
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, *argv],
            env={
                **os.environ,
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path),
                "HF_HUB_OFFLINE": "0",
            },
            capture_output=True,
            text=True,
            check=True,
        )
    assert says in run.stdout, run.stdout + run.stderr
    assert "hf_good" not in run.stdout
    assert not any("weights" in seen.path for seen in hub.seen)


@pytest.mark.parametrize(
    ("gpu", "offload", "tier"),
    [(25.2, "none", "fast"), (16.8, "model", "fast"), (12, "sequential", "eager")],
)
def test_float8_weights_stay_as_they_are_where_they_fit(
    gpu: float, offload: str, tier: str
) -> None:
    """A 24 GB card holds all of them and a 16 GB card takes turns, without 18 GB of originals."""
    card = Device("cuda", "GPU", int(gpu * GB), int(gpu * GB), (8, 9))
    machine = Machine((card,), 40 * GB, 100 * GB)
    chosen, _ = planning.place(_settings(), machine, NINE, "cuda", float8=True)
    situation = speed.situation(chosen, float8=True)
    faster = speed.choose("auto", "cuda", (8, 9), situation, float8=True)
    assert (chosen, faster.tier.name) == (offload, tier)
    assert faster.has("float8_text") == (tier == "fast")
    with pytest.raises(ModelUnavailable, match="GB"):
        planning.place(_settings(KLEIN_SPEED="fast"), _machine(16.8), NINE, "cuda")


@pytest.mark.parametrize(("text", "resident"), [("auto", 19.0), ("bfloat16", 24.2)])
def test_the_text_encoder_counts_as_it_is_kept(text: str, resident: float) -> None:
    """In float8 unless a setting says otherwise: 5.2 GB of base-9B."""
    settings = _settings(KLEIN_SPEED="fast", KLEIN_TEXT_ENCODER=text)
    _, why = planning.place(settings, _machine(48), NINE, "cuda")
    assert f"{resident} GB needed" in why
    with pytest.raises(ModelUnavailable, match=f"needs {resident} GB"):
        planning.place(settings, _machine(resident - 0.1), NINE, "cuda")


def test_float8_weights_on_a_gpu_without_float8() -> None:
    """Ampere has no float8 products: the weights are made full and drawn with exactly."""
    faster = speed.choose("auto", "cuda", (8, 6), frozenset(), float8=True)
    assert faster.tier.name == "exact"
    assert speed.choose("auto", "cuda", (8, 9), frozenset()).tier.name == "exact"
