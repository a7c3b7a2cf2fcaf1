"""What a request needs before a GPU is asked: its pictures read, its LoRAs on disk, and what only
their files know."""

from collections.abc import Sequence
from dataclasses import replace

from klein.app.inputs import gather
from klein.core import GenerationParams, Job, Progress, RequestContext
from klein.errors import InvalidRequest, LoraError
from klein.lora.file import LoraFile
from klein.lora.library import LoraLibrary
from klein.request.images import is_address
from klein.request.resolve import Resolved
from klein.request.schema import MAX_PROMPT
from klein.sources.address import redacted
from klein.sources.fetch import Fetcher


def prepare(
    resolved: Resolved, context: RequestContext, library: LoraLibrary, fetcher: Fetcher
) -> Job:
    """The job of a resolved request: its pictures read, and every LoRA found and fetched, or, with
    `lora_error: continue`, the error in its place.

    Raises InvalidRequest, ImageUnavailable, LoraError, Cancelled or DeadlineExceeded.
    """
    gathered = gather(resolved, context, fetcher)
    params, found = gathered.params, _find_loras(gathered.params, context, library)
    params, warnings = settle_loras(params, found)
    told = (*resolved.warnings, *gathered.warnings, *warnings)
    return Job(context, params, tuple(found), told, gathered.inputs)


def must_fetch(resolved: Resolved, library: LoraLibrary) -> bool:
    """Whether a server has to be asked for what a request needs. Cheap; never raises."""
    sources = resolved.inputs
    sent = (*sources.images, sources.init_image, sources.mask) if sources else ()
    return any(source and is_address(source) for source in sent) or not all(
        library.is_local(spec) for spec in resolved.params.loras
    )


def _find_loras(
    params: GenerationParams, context: RequestContext, library: LoraLibrary
) -> list[LoraFile | LoraError]:

    def on_bytes(have: int, total: int | None) -> None:
        context.report(Progress(have, total or have, 1, 1, stage="fetch"))

    found: list[LoraFile | LoraError] = []
    for spec in params.loras:
        context.check()
        try:
            found.append(
                library.find(spec, on_bytes, deadline=context.deadline, check=context.check)
            )
        except LoraError as error:
            if params.lora_error == "fail":
                raise
            found.append(error)
    return found


def settle_loras(
    params: GenerationParams, found: Sequence[LoraFile | LoraError]
) -> tuple[GenerationParams, tuple[str, ...]]:
    """What only the files know, and a sentence for each thing it changed.

    A scale left open is the file's own, else 1; a LoRA with trigger "auto" puts its trigger word
    in front of a prompt that lacks it. Raises InvalidRequest where that makes it too long: such a
    prompt could not be asked for again.
    """
    specs, warnings, prompt = [], [], params.prompt
    for spec, file in zip(params.loras, found, strict=True):
        name = redacted(spec.path)
        own = file.defaults.scale if isinstance(file, LoraFile) else None
        scale = next(value for value in (spec.scale, own, 1.0) if value is not None)
        if spec.scale is None and own is not None:
            warnings.append(f"{name} acts at {own:g}, the scale kept beside it")
        specs.append(replace(spec, scale=scale))
        if isinstance(file, LoraFile) and file.left_out:
            warnings.append(
                f"{name} acts without its {file.left_out} tensors for a text encoder: only the "
                "transformer is changed by LoRAs"
            )
        if spec.trigger != "auto" or not isinstance(file, LoraFile):
            continue
        if file.trigger is None:
            warnings.append(f"{name} has no trigger word that could be put into the prompt")
        elif file.trigger.lower() not in prompt.lower():
            prompt = _with_trigger(file.trigger, prompt, name)
            warnings.append(f"the trigger word {file.trigger!r} was put in front of the prompt")
    return replace(params, loras=tuple(specs), prompt=prompt), tuple(warnings)


def _with_trigger(trigger: str, prompt: str, name: str) -> str:
    together = f"{trigger}, {prompt}"
    if len(together) > MAX_PROMPT:
        raise InvalidRequest(
            f"prompt: with the trigger word {trigger!r} of {name} it has {len(together)} "
            f"characters, {MAX_PROMPT} are the most: shorten it, or set that LoRA's trigger to off",
            field="prompt",
        )
    return together
