"""Stock diffusers and each tier, side by side: seconds a picture, and what each costs and changes.

    python -m benchmarks.tiers                     # 9B geometry on a GPU, nano on the CPU
    python -m benchmarks.tiers --geometry 4B --sizes 1024x1024 768x1024 --rounds 5

All draw the same prompts with the same weights in one process and take turns, so that a clock that
drifts hits them alike. Every picture has a new prompt, so nothing is encoded twice but the empty
negative. Without real weights they are random (never zeros): those measure time truly and say
nothing about pictures; on nano the difference to stock is real. A rate above what the chip does in
a matrix product of its own is refused: then the measurement is wrong.
"""

import argparse
import copy
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from PIL import Image
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from benchmarks.lora_switching import NAMES, lora, transformer
from klein.core import EditInputs, GenerationParams, InputImage, Job, RequestContext
from klein.inference import assemble
from klein.inference.acceleration import attention
from klein.inference.pipeline import KleinPipeline
from klein.lora import file
from klein.lora.file import LoraFile
from klein.lora.spec import LoraSpec
from klein.models.catalog import GB, MODELS, ModelSpec
from klein.models.identify import NANO_FOLDER
from klein.models.machine import Machine
from klein.models.plan import Plan
from klein.models.speed import TIERS, Acceleration
from klein.request.resolve import resolve
from klein.request.schema import GenerateRequest
from klein.settings import Settings

TEXT_LAYERS = {"klein-base-9B": (4096, 12288), "klein-base-4B": (2560, 9728)}
"""Width and feed-forward width of the text encoders."""
MARGIN = 1.03
"""Over the measured rate of the chip; what a burst may differ."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is drawn: a size in pixels, and how many references of the native size go with it."""

    width: int
    height: int
    references: int


@dataclass(slots=True)
class Way:
    """One way to draw: `draw` takes a prompt number and a case, gives an image and its forwards."""

    name: str
    draw: Callable[[int, Case], tuple[Any, int]]
    float8: bool = False
    seconds: list[float] = field(default_factory=list)
    forwards: int = 0
    peak: int = 0
    kernels: int = 0
    pictures: list[Any] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)


# -- models ----------------------------------------------------------------------------------------


def random_pipeline(spec: ModelSpec, device: str) -> Any:
    """Stock diffusers with random bfloat16 weights of the model's geometry."""
    width, middle = TEXT_LAYERS[spec.name]
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=middle,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    )
    with torch.device(device):
        encoder = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
        vae = AutoencoderKLFlux2().to(torch.bfloat16).eval()
    nano = NANO_FOLDER / "model"
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(nano, subfolder="scheduler"),
        vae=vae,
        text_encoder=encoder,
        tokenizer=AutoTokenizer.from_pretrained(nano / "tokenizer"),
        transformer=transformer(spec, device, torch.bfloat16),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_pipeline(spec: ModelSpec, device: str) -> Any:
    """nano with its own weights, any other with random ones."""
    if spec.needs_gpu:
        return random_pipeline(spec, device)
    pipe = Flux2KleinPipeline.from_pretrained(NANO_FOLDER / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def shell(model: Any) -> Any:
    """Another module of the same weights: they are shared, what is done to the modules is not."""
    with torch.device("meta"):
        twin = type(model).from_config(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval()


def cut_encoder(encoder: Any) -> Any:
    """The text encoder as klein loads it, of the same weights."""
    config = type(encoder.config)(**encoder.config.to_dict())
    config.num_hidden_layers = 27
    config.layer_types = config.layer_types[:27]
    with torch.device("meta"):
        twin = Qwen3ForCausalLM(config)
    twin.load_state_dict(encoder.state_dict(), assign=True, strict=False)
    twin.model.rotary_emb = encoder.model.rotary_emb
    twin.model.norm = twin.lm_head = torch.nn.Identity()
    return twin.eval()


def served(stock: Any, model: Any, spec: ModelSpec, device: str, tier: str) -> KleinPipeline:
    """klein's pipeline of that tier, on the weights of `stock` and the transformer `model`."""
    plan = Plan(
        str(NANO_FOLDER / "model"),
        None,
        spec,
        Machine.probe(os.environ).device("cuda" if device == "cuda" else "cpu"),
        "none",
        "for a benchmark",
        Acceleration(TIERS[tier], TIERS[tier].options),
        "memory",
    )
    vae = AutoencoderKLFlux2.from_config(stock.vae.config)
    vae.load_state_dict(stock.vae.state_dict())
    parts = assemble.plain(
        transformer=model,
        vae=vae.to(device, stock.vae.dtype).eval(),
        text_encoder=cut_encoder(stock.text_encoder),
        tokenizer=stock.tokenizer,
    )
    capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    backend = attention.choose("auto", device, capability, fused="fused" in TIERS[tier].options)
    return assemble.build(parts, plan, Settings(), backend)


# -- ways ------------------------------------------------------------------------------------------


def params_of(spec: ModelSpec, number: int, case: Case, steps: int) -> GenerationParams:
    request = GenerateRequest(
        prompt=f"a portrait of a person, picture number {number} of {case.width} by {case.height}",
        width=case.width,
        height=case.height,
        num_inference_steps=steps,
        guidance_scale=2.5,
        seed=number,
    )
    return resolve(request, spec, lambda: 0).params


def pictures(count: int, side: int) -> list[Image.Image]:
    """References of `side` by `side` pixels."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return [Image.fromarray(each).resize((side, side)) for each in coarse]


def by_stock(pipe: Any, spec: ModelSpec, steps: int) -> Way:
    """The pipeline as diffusers gives it, resident and eager."""

    def draw(number: int, case: Case) -> tuple[Any, int]:
        params = params_of(spec, number, case, steps)
        made = pipe(
            image=pictures(case.references, spec.native_size) or None,
            prompt=params.prompt,
            width=case.width,
            height=case.height,
            num_inference_steps=steps,
            guidance_scale=params.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(params.seed),
            max_sequence_length=params.max_sequence_length,
        )
        return made.images[0], 2 * steps

    return Way("stock", draw)


def by_klein(
    name: str,
    pipe: KleinPipeline,
    spec: ModelSpec,
    steps: int,
    adapter: LoraFile | None = None,
) -> Way:
    """A tier, as an engine drives it."""
    loras = (LoraSpec(adapter.name, scale=0.8),) if adapter else ()

    def draw(number: int, case: Case) -> tuple[Any, int]:
        params = replace(params_of(spec, number, case, steps), loras=loras)
        files = (adapter,) if adapter else ()
        sent = pictures(case.references, spec.native_size)
        references = tuple(InputImage(each, str(n), *each.size) for n, each in enumerate(sent))
        job = Job(RequestContext(math.inf), params, files, inputs=EditInputs(references))
        result = pipe.generate(job)
        if any(not report.applied for report in result.loras):
            raise SystemExit(f"{name}: {result.loras}")
        way.stages = asdict(result.timings)
        return result.images[0].image, result.forwards

    way = Way(name, draw, float8="float8" in pipe.info.speed_options)
    return way


# -- measuring -------------------------------------------------------------------------------------


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def compiled(device: str) -> int:
    if device != "cuda":
        return 0
    from klein.inference.acceleration.kernels import Compilations

    return Compilations.count


def run(way: Way, number: int, case: Case, device: str) -> None:
    """One picture into the way's figures."""
    wait(device)
    before = compiled(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    started = time.perf_counter()
    picture, way.forwards = way.draw(number, case)
    wait(device)
    way.seconds.append(time.perf_counter() - started)
    way.kernels += compiled(device) - before
    way.pictures.append(np.asarray(picture, dtype=np.int16))
    if device == "cuda":
        way.peak = max(way.peak, torch.cuda.max_memory_allocated() - held)


def teraflops(spec: ModelSpec, case: Case) -> float:
    """Of one forward: the blocks' products and attention, 2 a multiply-add."""
    image = case.width * case.height // 256 + case.references * (spec.native_size // 16) ** 2
    text = spec.max_sequence_length
    blocks = spec.double_blocks + spec.single_blocks
    linear = 2 * 13 * spec.hidden**2 * (image + text) * blocks
    return (linear + 4 * (image + text) ** 2 * spec.hidden * blocks) / 1e12


def ceiling(device: str, float8: bool) -> float:
    """TFLOP/s of a large product on random data."""
    if device != "cuda":
        return math.inf
    side = 8192
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16).unbind()
    if float8:
        ones = torch.ones(side, 1, device=device)
        left, right = (each.to(torch.float8_e4m3fn) for each in (a, b))

        def product() -> None:
            torch._scaled_mm(
                left, right.t(), ones, ones.t(), out_dtype=torch.bfloat16, use_fast_accum=True
            )
    else:

        def product() -> None:
            torch.mm(a, b.t())

    for _ in range(3):
        product()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(10):
        product()
    end.record()
    torch.cuda.synchronize()
    seconds: float = begin.elapsed_time(end) / 1000
    return 10 * 2 * side**3 / seconds / 1e12


def table(ways: list[Way], work: float, device: str) -> Iterator[str]:
    """Rows for forwards of `work` TFLOP; raises SystemExit for a rate the chip cannot have."""
    stock = statistics.median(ways[0].seconds)
    head = f"{'way':<12}{'seconds':>9}{'from':>8}{'to':>8}{'× stock':>9}{'forwards':>10}"
    yield head + f"{'TFLOP/s':>9}{'peak GB':>9}{'kernels':>9}{'differs':>9}"
    for way in ways:
        seconds = statistics.median(way.seconds)
        rate = work * way.forwards / seconds
        most = ceiling(device, way.float8)
        if rate > most * MARGIN:
            raise SystemExit(f"{way.name}: {rate:.0f} TFLOP/s, and the chip does {most:.0f}")
        pairs = zip(way.pictures, ways[0].pictures, strict=True)
        differs = statistics.mean(float(np.abs(a - b).mean()) for a, b in pairs)
        yield (
            f"{way.name:<12}{seconds:9.3f}{min(way.seconds):8.3f}{max(way.seconds):8.3f}"
            f"{stock / seconds:9.2f}{way.forwards:10}{rate:9.4g}{way.peak / GB:9.2f}"
            f"{way.kernels:9}{differs:9.2f}"
        )


def ways_of(spec: ModelSpec, device: str, args: argparse.Namespace, loras: Path) -> list[Way]:
    """Stock, the tiers, and the exact tier with a LoRA on every block linear."""
    stock = stock_pipeline(spec, device)
    ways = [by_stock(stock, spec, args.steps)]
    for tier in args.tiers:
        pipe = served(stock, shell(stock.transformer), spec, device, tier)
        ways.append(by_klein(tier, pipe, spec, args.steps))
        if tier == "exact" and args.rank:
            path = lora(stock.transformer, args.rank, loras / "random.safetensors", 1)
            pipe = served(stock, copy.deepcopy(stock.transformer), spec, device, tier)
            adapter = file.inspect(path, path.name)
            ways.append(by_klein(f"+ LoRA {args.rank}", pipe, spec, args.steps, adapter))
    return ways


@torch.inference_mode()
def main() -> None:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--geometry", choices=NAMES, default="9B" if device == "cuda" else "nano")
    parser.add_argument("--sizes", nargs="+", help="such as 1024x1024 512x512")
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=["exact", "fast", "turbo"])
    parser.add_argument("--references", nargs="+", type=int, default=[0], help="such as 0 1 4")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=128, help="of the LoRA; 0 leaves it out")
    args = parser.parse_args()
    spec = MODELS[NAMES[args.geometry]]
    native = spec.native_size
    sizes = args.sizes or [f"{native}x{native}"] + ([] if device == "cpu" else ["512x512"])
    if device == "cuda":
        from klein.inference.acceleration import kernels

        kernels.keep_in(Settings().kernel_cache.expanduser())
    with tempfile.TemporaryDirectory() as folder:
        ways = ways_of(spec, device, args, Path(folder))
        print(
            f"{spec.name} on {torch.cuda.get_device_name() if device == 'cuda' else 'the CPU'}, "
            f"torch {torch.__version__}, {args.steps} steps, guidance 2.5, median of {args.rounds}",
            flush=True,
        )
        for references in args.references:
            for text in sizes:
                width, height = map(int, text.split("x"))
                measure(ways, spec, Case(width, height, references), device, args.rounds)


def measure(ways: list[Way], spec: ModelSpec, case: Case, device: str, rounds: int) -> None:
    """Warm each way up, then let them take turns; print the table."""
    for way in ways:
        run(way, 0, case, device)
        way.seconds, way.pictures, way.kernels, way.peak = [], [], 0, 0
    for number in range(1, rounds + 1):
        for way in ways:
            run(way, number, case, device)
    work = teraflops(spec, case)
    beside = f", {case.references} references" if case.references else ""
    print(f"\n{case.width}×{case.height}{beside}: {work:.4g} TFLOP a forward")
    for line in table(ways, work, device):
        print(line)
    for way in ways:
        if way.stages:
            stages = (f"{name} {seconds:.3f}" for name, seconds in way.stages.items())
            print(f"  {way.name:<10} last picture: {', '.join(stages)}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
