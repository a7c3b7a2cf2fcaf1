"""What every door does first: find the LoRAs, plan, then hand the engine a way to load."""

from collections.abc import Callable, Mapping

from klein.core import ImagePipeline
from klein.lora.library import LoraLibrary, Tokens
from klein.models import plan as preflight
from klein.models.catalog import GB
from klein.models.machine import Machine
from klein.settings import Settings
from klein.sources.cache import LoraStore
from klein.sources.fetch import Fetcher


def library(settings: Settings) -> LoraLibrary:
    """The LoRAs of these settings."""
    store = LoraStore(
        settings.lora_cache.expanduser(), settings.lora_cache_gb * GB, grace=settings.timeout
    )
    tokens = Tokens(settings.hf_token, settings.civitai_token)
    folder = preflight.lora_folder(settings)
    return LoraLibrary(folder, store, Fetcher(settings.fetch_hosts), tokens)


def loader(
    settings: Settings, environ: Mapping[str, str], loras: LoraLibrary | None = None
) -> Callable[[], ImagePipeline]:
    """Check that the model can be had and fits, and return what loads it.

    Raises ModelUnavailable. torch is imported when the returned function is called, and diffusers,
    which takes longer, while the weights are read.
    """
    plan = preflight.plan(settings, Machine.probe(environ))
    loras = loras or library(settings)

    def load() -> ImagePipeline:
        from klein.inference.loading import modules as loading

        found = preflight.fetched(plan, settings)
        begun = loading.begin(found)
        from klein.inference import assemble as assembly

        return assembly.load(found, settings, loras, begun)

    return load
