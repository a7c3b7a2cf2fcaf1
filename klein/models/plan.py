"""Decides, before a byte of weights is read, what to load, from where and how to place it.

Everything that would stop the start half an hour later stops it here, with one sentence.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from klein.errors import ModelUnavailable
from klein.models import catalog, locate, speed
from klein.models.catalog import GB, ModelSpec
from klein.models.identify import LOCAL, NANO_FOLDER, ReadConfig, folder_reader, identify, local
from klein.models.machine import Device, Kind, Machine
from klein.models.speed import Acceleration
from klein.settings import Offload, Settings
from klein.sources import hub
from klein.sources.hub import HubFailed, Problem

SEQUENTIAL_BYTES = 6 * GB
"""With sequential offload: the largest layer and a picture."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to load: `source` is a folder, or a Hub id to `download`; `why` explains the placement.

    `target` is what draws, `acceleration` is what is put on it, `found_in` says in words where
    the weights are, `originals_fit` whether float8 copies fit on the GPU beside their originals.
    """

    source: str
    revision: str | None
    spec: ModelSpec
    target: Device
    offload: Offload
    why: str
    acceleration: Acceleration
    found_in: str
    local: bool = False
    download: bool = False
    originals_fit: bool = True

    @property
    def device(self) -> Kind:
        """The kind of the target."""
        return self.target.kind

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU draws."""
        return self.target.kind == "cuda"

    @property
    def read_to(self) -> str:
        """The device that weights are read to."""
        return self.device if self.offload == "none" else "cpu"

    @property
    def transformer_to(self) -> str:
        """The device that the transformer is read to: originals of float8 copies may not fit."""
        return "cpu" if self.acceleration.has("float8") and not self.originals_fit else self.read_to


def plan(settings: Settings, machine: Machine) -> Plan:
    """The plan for these settings on this machine; raises ModelUnavailable with the way out."""
    known = catalog.known(settings.model_id)
    repo = (known.repo if known else None) or settings.model_id
    found = local(settings.model_id) or locate.find(repo, settings.model_revision, locate.places())
    read = folder_reader(found.folder) if found else _hub_reader(repo, settings)
    spec = known or identify(read)
    device = machine.device(_kind(settings, machine, spec))
    offload, why = place(settings, machine, spec, device.kind)
    situation = {offload} | ({"distilled"} if spec.distilled else set())
    faster = speed.choose(settings.speed, device.kind, device.capability, frozenset(situation))
    if known:
        read("model_index.json")
    return Plan(
        str(found.folder) if found else repo,
        found.revision if found else settings.model_revision,
        spec,
        device,
        offload,
        why,
        faster,
        found_in=found.place if found else "the Hugging Face Hub, to be downloaded",
        local=found is not None and found.place == LOCAL,
        download=found is None,
        originals_fit=device.kind == "cpu" or _both_fit(spec, machine),
    )


def fetched(plan: Plan, settings: Settings) -> Plan:
    """The plan with its model on disk: downloaded, if it was not. Raises ModelUnavailable."""
    if not plan.download:
        return plan
    token = settings.hf_token.value if settings.hf_token else None
    found = locate.download(plan.source, plan.revision, token)
    return replace(plan, source=str(found.folder), revision=found.revision, download=False)


def _both_fit(spec: ModelSpec, machine: Machine) -> bool:
    both = spec.resident_bytes + spec.block_parameters
    return both + working_bytes(spec, "fast") < machine.device("cuda").free


def working_bytes(spec: ModelSpec, tier: str) -> int:
    """GPU memory beside the weights for pictures of the model's native size."""
    return catalog.CONTEXT_BYTES + catalog.PEAKS[tier].of(spec.native_size, spec.native_size)


def lora_folder(settings: Settings) -> Path | None:
    """The folder local LoRAs are read from: the setting, or the built-in model's own."""
    if settings.lora_dir is None and settings.model_id == "nano":
        return NANO_FOLDER / "loras"
    return settings.lora_dir


_FIELDS = {
    Problem.GATED: "HF_TOKEN",
    Problem.NO_REVISION: "MODEL_REVISION",
}
"""The setting to change; MODEL_ID where it is none of these."""


def _hub_reader(repo: str, settings: Settings) -> ReadConfig:
    """Reads small files of a Hub repository through its cache; its errors are the way out."""
    token = settings.hf_token.value if settings.hf_token else None

    def read(name: str) -> dict[str, object]:
        try:
            return hub.read_json(repo, name, settings.model_revision, token)
        except HubFailed as error:
            why = _way_out(error, repo, settings)
            field = _FIELDS.get(error.problem, "MODEL_ID")
            raise ModelUnavailable(why, field=field) from error

    return read


def _way_out(error: HubFailed, repo: str, settings: Settings) -> str:
    match error.problem:
        case Problem.GATED if settings.hf_token:
            return f"{repo} is gated: accept its license there with the account of your HF_TOKEN"
        case Problem.GATED:
            return f"{repo} is gated: accept its license there and set HF_TOKEN"
        case Problem.NO_REPOSITORY:
            return f"{repo} is not on the Hub, or private: check MODEL_ID, set HF_TOKEN"
        case Problem.NO_REVISION:
            return f"{repo} has no revision {settings.model_revision!r}: check MODEL_REVISION"
        case Problem.UNWRITABLE:
            return str(error)
        case _:
            return f"{repo} {error}: check the network, or use MODEL_ID=nano"


def _kind(settings: Settings, machine: Machine, spec: ModelSpec) -> Kind:
    if settings.device == "cuda" and not machine.gpus:
        raise ModelUnavailable(
            "KLEIN_DEVICE=cuda, but there is no NVIDIA GPU here (or no driver); "
            "in Docker, start with --gpus all",
            field="KLEIN_DEVICE",
        )
    device: Kind = "cuda" if machine.gpus and settings.device != "cpu" else "cpu"
    if device == "cpu" and spec.needs_gpu and settings.device == "auto":
        raise ModelUnavailable(
            f"{spec.name} needs an NVIDIA GPU and there is none here: use MODEL_ID=nano to try "
            "klein on the CPU, or KLEIN_DEVICE=cpu to wait hours for a picture",
            field="MODEL_ID",
        )
    if device == "cpu" and machine.memory_free < spec.resident_bytes * 2:
        raise ModelUnavailable(
            f"{spec.name} on the CPU needs {_gb(spec.resident_bytes * 2)} of memory and "
            f"{_gb(machine.memory_free)} are free",
            field="MODEL_ID",
        )
    return device


def place(
    settings: Settings, machine: Machine, spec: ModelSpec, device: Kind
) -> tuple[Offload, str]:
    """How to spread the weights, and why; raises ModelUnavailable if they fit nowhere."""
    if device == "cpu":
        return "none", "on the CPU"
    tier = speed.wanted(settings.speed, device)
    free = machine.device("cuda").free
    working = working_bytes(spec, tier.name)
    resident = spec.resident_bytes
    if "float8" in tier.options:
        resident -= spec.block_parameters
    needs: dict[Offload, int] = {
        "none": resident + working,
        "model": max(spec.transformer_bytes, spec.text_encoder_bytes) + spec.vae_bytes + working,
        "sequential": min(SEQUENTIAL_BYTES, resident + working),
    }
    allowed = [x for x in needs if settings.offload in ("auto", x)]
    if settings.speed != "auto" and settings.offload == "auto":
        allowed = [x for x in allowed if not speed.excludes(tier, x)]
    fitting = next((x for x in allowed if needs[x] <= free), None)
    if fitting is None:
        least = needs[allowed[-1]]
        hint = "; KLEIN_OFFLOAD=auto would decide by itself" if settings.offload != "auto" else ""
        if settings.speed not in ("auto", "eager"):
            hint = f"; KLEIN_SPEED={settings.speed} needs them at hand, KLEIN_SPEED=auto does not"
        raise ModelUnavailable(
            f"{spec.name} needs {_gb(least)} of GPU memory with offload {allowed[-1]!r}, and "
            f"{_gb(free)} are free: use a larger GPU or klein-base-4B{hint}",
            field="KLEIN_OFFLOAD",
        )
    kept = 0 if fitting == "none" else spec.resident_bytes
    if "float8" in tier.options and not _both_fit(spec, machine):
        kept = spec.transformer_bytes
    if machine.memory_free < kept:
        raise ModelUnavailable(
            f"offload {fitting!r} in the {tier.name} tier keeps {_gb(kept)} of weights in main "
            f"memory and {_gb(machine.memory_free)} are free",
            field="KLEIN_OFFLOAD",
        )
    placed = "resident on the GPU" if fitting == "none" else f"{fitting} offload"
    return fitting, f"{placed}: {_gb(needs[fitting])} needed, {_gb(free)} free"


def _gb(size: int) -> str:
    return f"{size / GB:.1f} GB"
