"""From settings to a generator: check, plan, and hand the engine a way to load."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from klein.app.generator import Generator
from klein.app.metrics import Recorder
from klein.core import ImagePipeline
from klein.engine.engine import Engine
from klein.errors import KleinError, LoraError, ModelUnavailable
from klein.lora.library import LoraLibrary, Tokens
from klein.lora.spec import LoraSpec
from klein.models.catalog import GB
from klein.models.machine import Machine
from klein.models.plan import fetched, lora_folder, plan
from klein.output.delivery import Bucket
from klein.settings import Settings
from klein.sources.cache import Store
from klein.sources.fetch import Fetcher, ignore_size

if TYPE_CHECKING:
    from klein.app.tracing import Tracing

Load = Callable[[], ImagePipeline]


def library(settings: Settings, recorder: Recorder | None = None) -> LoraLibrary:
    """The LoRAs of these settings."""
    store = Store(
        settings.lora_cache.expanduser(), settings.lora_cache_gb * GB, grace=settings.timeout
    )
    tokens = Tokens(settings.hf_token, settings.civitai_token)
    on_received = recorder.received("lora") if recorder else ignore_size
    fetcher = Fetcher(settings.fetch_hosts, on_received=on_received)
    return LoraLibrary(lora_folder(settings), store, fetcher, tokens)


def loader(settings: Settings, environ: Mapping[str, str]) -> Load:
    """Check that the model can be had and fits, and return what loads it.

    Raises ModelUnavailable. torch is imported when the returned function is called, and diffusers,
    which takes longer, while the weights are read.
    """
    planned = plan(settings, Machine.probe(environ))

    @_without_collections()
    def load() -> ImagePipeline:
        from klein.inference.loading import modules

        found = fetched(planned, settings)
        pending = modules.start_reading(found)
        from klein.inference import assemble

        return assemble.load(found, settings, pending)

    return load


@contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage collection inside. Imports make objects by the hundred thousand, nearly all of
    them to stay, and the collector would walk them again each time they grow by a quarter."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def generator(
    settings: Settings,
    load: Load,
    *,
    on_load_failed: Callable[[KleinError], None] = lambda _: None,
    on_unhealthy: Callable[[KleinError], None] = lambda _: None,
    recorder: Recorder | None = None,
    tracing: "Tracing | None" = None,
) -> Generator:
    """The generator of these settings, its model being loaded in the background.

    Raises BadSetting for a bucket that is half set, and for marks and a filter that cannot work.
    """
    bucket = Bucket.from_settings(settings)
    loras = library(settings, recorder)
    engine = Engine(
        partial(_with_base_loras, load, loras, settings),
        queue_size=settings.queue_size,
        on_ready=lambda: recorder.update(engine, loras) if recorder else None,
        on_load_failed=on_load_failed,
        on_unhealthy=on_unhealthy,
    )
    made = Generator(engine, loras, settings, bucket, recorder, tracing)
    engine.start()
    return made


def _with_base_loras(load: Load, loras: LoraLibrary, settings: Settings) -> ImagePipeline:
    """What `load` gives; raises ModelUnavailable unless every LoRA that is to be always on is here
    and fits."""
    try:
        found = [loras.find(LoraSpec(*named)) for named in settings.base_loras]
    except LoraError as error:
        raise _base_lora_fails(str(error)) from error
    pipeline = load()
    spec = pipeline.info.spec
    for file in found:
        if file.hidden not in (None, spec.hidden):
            raise _base_lora_fails(f"LoRA {file.name!r} is for {file.base}, not for {spec.name}")
    return pipeline


def _base_lora_fails(why: str) -> ModelUnavailable:
    return ModelUnavailable(f"KLEIN_BASE_LORAS: {why}", field="KLEIN_BASE_LORAS")
