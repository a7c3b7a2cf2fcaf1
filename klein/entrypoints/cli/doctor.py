"""What this machine can run, what is missing, and how to get it."""

import os
import sys
from importlib import metadata

from klein.app.filter import Filter
from klein.app.webhooks import Webhooks
from klein.entrypoints.cli.exit_codes import OK
from klein.entrypoints.http.auth import read_keys
from klein.errors import KleinError
from klein.models.catalog import GB, MODELS
from klein.models.machine import Kind, Machine
from klein.models.plan import place, plan
from klein.output.delivery import Bucket
from klein.output.marks import Marks
from klein.settings import Settings


def doctor() -> int:
    """`klein doctor`: the report of this machine."""
    print("\n".join(report(Settings.from_env(os.environ), Machine.probe(os.environ))))
    return OK


def report(settings: Settings, machine: Machine) -> list[str]:
    """Lines for a person; nothing is loaded."""
    return [
        *_machine(machine),
        "",
        *_software(machine),
        "",
        *_models(settings, machine),
        "",
        *_images(settings),
        "",
        *_verdict(settings, machine),
    ]


def _machine(machine: Machine) -> list[str]:
    gpus = [
        f"  GPU       {gpu.name}, {gpu.free / GB:.1f} of {gpu.total / GB:.1f} GB free"
        for gpu in machine.gpus
    ]
    return [
        "This machine",
        *(gpus or ["  GPU       none (no NVIDIA driver answers): only the built-in model runs"]),
        *_users(len(machine.gpus)),
        f"  memory    {machine.memory_free / GB:.1f} GB free",
        f"  disk      {machine.disk_free / GB:.1f} GB free where models are cached",
    ]


def _users(gpus: int) -> list[str]:
    """What would use so many GPUs."""
    if not gpus:
        return []
    every = f"klein serve --replicas {gpus} uses all {gpus}"
    if _version("ray") is None:
        every += ", once Ray is there: pip install 'klein[ray]'"
    one = "bentoml serve, klein generate and the RunPod worker use one"
    return [f"  GPUs      {gpus}: {one}" + (f"; {every}" if gpus > 1 else "")]


def _software(machine: Machine) -> list[str]:
    lines = ["Software", f"  python    {sys.version.split()[0]}"]
    for name in ("torch", "diffusers", "transformers", "bentoml", "runpod"):
        lines.append(f"  {name:<9} {_version(name) or 'missing: pip install -r requirements.txt'}")
    flash = _version("flash-attn") or "not installed; only GPUs before Hopper gain from it"
    lines.append(f"  flash-attn {flash}")
    if machine.gpus and "+cpu" in (_version("torch") or ""):
        lines.append("  ! this torch cannot use the GPU: install a CUDA build of the same version")
    return lines


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _models(settings: Settings, machine: Machine) -> list[str]:
    lines = ["Models"]
    device: Kind = "cuda" if machine.gpus else "cpu"
    for spec in MODELS.values():
        try:
            if spec.needs_gpu and device == "cpu":
                fits = "needs a GPU"
            else:
                fits = place(settings, machine, spec, device)[1]
        except KleinError as error:
            fits = str(error)
        gate = ", gated: needs HF_TOKEN" if spec.gated and not settings.hf_token else ""
        lines.append(f"  {spec.name:<14} {fits} ({spec.license}{gate})")
    return lines


def _images(settings: Settings) -> list[str]:
    """Which marks and filter the settings ask for."""
    signed = settings.c2pa_cert or settings.c2pa_key
    return [
        "Images",
        f"  AI mark   {'on' if settings.ai_mark else 'off (KLEIN_AI_MARK)'}",
        f"  C2PA      {f'signed with {signed}' if signed else 'off (KLEIN_C2PA_CERT and _KEY)'}",
        f"  metadata  {settings.metadata}",
        f"  filter    {settings.filter or 'none (KLEIN_FILTER)'}",
    ]


def _verdict(settings: Settings, machine: Machine) -> list[str]:
    try:
        planned = plan(settings, machine)
        Bucket.from_settings(settings)
        Webhooks.from_settings(settings)
        read_keys(settings)
        Marks.from_settings(settings)
        Filter.from_settings(settings)
    except KleinError as error:
        return [f"MODEL_ID={settings.model_id} cannot start: {error}"]
    speed = f"{planned.acceleration.tier.name} tier"
    if planned.acceleration.why:
        speed += f" ({planned.acceleration.why})"
    verdict = f"MODEL_ID={settings.model_id} can start: {planned.spec.name}, {planned.why}; {speed}"
    return [verdict, *(f"  {note}" for note in planned.notes)]
