"""What every door does first: plan, then hand the engine a way to load."""

from collections.abc import Callable, Mapping

from klein import preflight
from klein.core import ImagePipeline
from klein.lora.library import LoraLibrary
from klein.machine import Machine
from klein.settings import Settings


def loader(settings: Settings, environ: Mapping[str, str]) -> Callable[[], ImagePipeline]:
    """Check that the model can be had and fits, and return what loads it.

    Raises ModelUnavailable. torch is imported when the returned function is called.
    """
    plan = preflight.plan(settings, Machine.probe(environ))
    library = LoraLibrary(preflight.lora_folder(settings), settings.hf_token)

    def load() -> ImagePipeline:
        from klein import pipeline

        return pipeline.load(plan, settings, library)

    return load
