"""Decides, before a byte of weights is read, what to load, from where and how to place it.

Everything that would stop the start half an hour later stops it here, with one sentence.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from klein.errors import ModelUnavailable
from klein.models import catalog, checkpoint, locate, speed, transformer_file
from klein.models.catalog import GB, ModelSpec
from klein.models.checkpoint import Checkpoint
from klein.models.identify import LOCAL, NANO_FOLDER, ReadConfig, folder_reader, identify, local
from klein.models.locate import Found
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
    `checkpoint` is what the transformer's weights are read from, where they are not the plain ones
    of `source`, and `notes` what is to be said of that.
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
    checkpoint: Checkpoint | None = None
    notes: tuple[str, ...] = ()

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

    @property
    def has_originals(self) -> bool:
        """Whether the block linears' full weights are on the device that draws."""
        return not self.acceleration.has("float8") or (
            self.originals_fit and not _is_float8(self.checkpoint)
        )

    @property
    def tiers(self) -> dict[str, Acceleration]:
        """What a request may choose from, by the tiers' names; the server's own is among them."""
        situation = speed.situation(
            self.offload, distilled=self.spec.distilled, float8=_is_float8(self.checkpoint)
        )
        return speed.offered(self.acceleration, situation, originals=self.has_originals)

    @property
    def keeps_float8(self) -> bool:
        """Whether the checkpoint's float8 weights act as they are; if not, they are made bfloat16
        while they are read."""
        return _is_float8(self.checkpoint) and self.acceleration.has("float8")


def plan(settings: Settings, machine: Machine) -> Plan:
    """The plan for these settings on this machine; raises ModelUnavailable with the way out."""
    if known := catalog.known(settings.model_id):
        _kind(settings, machine, known)  # before the Hub is asked for anything
    model = locate_model(settings)
    spec, notes, found = model.spec, model.notes, model.found
    device = machine.device(_kind(settings, machine, spec))
    float8 = _is_float8(model.checkpoint)
    offload, why = place(settings, machine, spec, device.kind, float8=float8)
    situation = speed.situation(offload, distilled=spec.distilled, float8=float8)
    faster = speed.choose(
        settings.speed,
        device.kind,
        device.capability,
        situation,
        float8=float8,
        without=_without(settings),
    )
    if float8 and not faster.has("float8"):
        notes += (
            f"its float8 weights are turned into full ones once, while they are read: the "
            f"{faster.tier.name} tier needs those",
        )
    return Plan(
        str(found.folder) if found else model.repo,
        found.revision if found else settings.model_revision,
        spec,
        device,
        offload,
        why,
        faster,
        found_in=found.place if found else "the Hugging Face Hub, to be downloaded",
        local=found is not None and found.place == LOCAL,
        download=found is None,
        originals_fit=device.kind == "cpu" or float8 or _both_fit(spec, machine, settings),
        checkpoint=model.checkpoint,
        notes=notes,
    )


@dataclass(frozen=True, slots=True)
class Located:
    """Which model MODEL_ID and KLEIN_TRANSFORMER are. `found` is None where `repo` is to be
    downloaded; the rest as in Plan."""

    repo: str
    found: Found | None
    spec: ModelSpec
    checkpoint: Checkpoint | None
    notes: tuple[str, ...] = ()


def locate_model(settings: Settings) -> Located:
    """What the settings name; nothing but headers and configurations is fetched. Raises
    ModelUnavailable."""
    known = catalog.known(settings.model_id)
    repo = (known.repo if known else None) or settings.model_id
    file = transformer_file.find(settings)
    parts = locate.BESIDE_TRANSFORMER if file else locate.WEIGHTED
    found = local(settings.model_id) or locate.find(
        repo, settings.model_revision, locate.places(), parts
    )
    read = folder_reader(found.folder) if found else _hub_reader(repo, settings)
    spec = known or identify(read)
    if known:
        read("model_index.json")
    notes: tuple[str, ...] = ()
    if file:
        spec, known_by = file.spec(spec)
        notes = (f"transformer: {file.name}, {file.numbers}, {known_by}", *file.notes)
    elif found and (file := checkpoint.of_folder(found.folder / "transformer")):
        notes = (f"transformer: {file.numbers}",)
    return Located(repo, found, spec, file, notes)


def fetch_model(model: Located, settings: Settings, revision: str | None) -> Located:
    """`model` with everything on disk: fetched, if it was not. Raises ModelUnavailable."""
    file, found = model.checkpoint, model.found
    if file and not file.files:
        file = transformer_file.fetch(settings, file)
        if (spec := file.spec(model.spec)[0]) != model.spec:
            raise ModelUnavailable(
                f"KLEIN_TRANSFORMER: {file.name} is {spec.name} by its sha256, which is known now "
                f"that it is here, and not {model.spec.name}: start klein again",
                field="KLEIN_TRANSFORMER",
            )
    if found is None:
        token = settings.hf_token.value if settings.hf_token else None
        parts = locate.BESIDE_TRANSFORMER if file else locate.WEIGHTED
        found = locate.download(model.repo, revision, token, parts)
        file = file or checkpoint.of_folder(found.folder / "transformer")
    return replace(model, found=found, checkpoint=file)


def fetched(plan: Plan, settings: Settings) -> Plan:
    """The plan with its model on disk: fetched, if it was not. Raises ModelUnavailable."""
    here = None if plan.download else Found(plan.found_in, Path(plan.source), plan.revision)
    model = Located(plan.source, here, plan.spec, plan.checkpoint)
    made = fetch_model(model, settings, plan.revision)
    if made.found is None or made == model:
        return plan
    return replace(
        plan,
        source=str(made.found.folder),
        revision=made.found.revision,
        download=False,
        checkpoint=made.checkpoint,
    )


def _is_float8(file: Checkpoint | None) -> bool:
    return file is not None and file.float8


def _without(settings: Settings) -> frozenset[str]:
    """The optional speed options that are turned off."""
    return frozenset({"float8_text"} if settings.text_encoder == "bfloat16" else ())


def _both_fit(spec: ModelSpec, machine: Machine, settings: Settings) -> bool:
    _, text = spec.bytes_of(float8=True, float8_text=not _without(settings))
    both = spec.transformer_bytes + spec.block_parameters + text + spec.vae_bytes
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
    settings: Settings, machine: Machine, spec: ModelSpec, device: Kind, *, float8: bool = False
) -> tuple[Offload, str]:
    """How to spread the weights, and why; raises ModelUnavailable if they fit nowhere. `float8`
    says that the transformer's weights come so."""
    if device == "cpu":
        return "none", "on the CPU"
    gpu = machine.device("cuda")
    tier, free = speed.wanted(settings.speed, device, gpu.capability, float8=float8), gpu.free
    working = working_bytes(spec, tier.name)
    options = set(tier.options) - _without(settings)
    transformer, text = spec.bytes_of(
        float8="float8" in options, float8_text="float8_text" in options
    )
    resident = transformer + text + spec.vae_bytes
    needs: dict[Offload, int] = {
        "none": resident + working,
        "model": max(transformer, text) + spec.vae_bytes + working,
        "sequential": min(SEQUENTIAL_BYTES, resident + working),
    }
    allowed = [x for x in needs if settings.offload in ("auto", x)]
    if settings.speed != "auto" and settings.offload == "auto":
        allowed = [
            x for x in allowed if not speed.excludes(tier, speed.situation(x, float8=float8))
        ]
    fitting = next((x for x in allowed if needs[x] <= free), None)
    if fitting is None:
        least = needs[allowed[-1]]
        hint = "; KLEIN_OFFLOAD=auto would decide by itself" if settings.offload != "auto" else ""
        if settings.speed != "auto" and speed.excludes(tier, {"sequential"}):
            hint = f"; KLEIN_SPEED={settings.speed} needs them at hand, KLEIN_SPEED=auto does not"
        raise ModelUnavailable(
            f"{spec.name} needs {_gb(least)} of GPU memory with offload {allowed[-1]!r}, and "
            f"{_gb(free)} are free: use a larger GPU or klein-base-4B{hint}",
            field="KLEIN_OFFLOAD",
        )
    kept = {"none": 0, "model": resident}.get(fitting, spec.resident_bytes)
    if "float8" in tier.options and not float8 and not _both_fit(spec, machine, settings):
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
