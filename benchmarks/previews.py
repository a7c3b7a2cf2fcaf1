"""What previews cost: seconds a picture without, with small ones of the linear map, and with
partial images that the VAE decodes.

    python -m benchmarks.previews                   # 9B geometry on a GPU, nano on the CPU
    python -m benchmarks.previews --tiers exact --every 4 1 --partial 3 --rounds 5

All draw with the same weights in one process and take turns; every picture has a new prompt, so
that none is encoded twice. What is sent is made into a file in a thread of its own, as in service,
and not waited for. Without real weights they are random, as in benchmarks.tiers.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from benchmarks.lora_switching import NAMES
from benchmarks.tiers import Case, params_of, served, shell, stock_pipeline, wait
from klein.core import Job, Preview, PreviewRequest, RequestContext
from klein.inference.pipeline import KleinPipeline
from klein.models.catalog import MODELS, ModelSpec
from klein.models.speed import TIERS
from klein.output import images
from klein.output.images import PREVIEW_EVERY
from klein.request.formats import FORMATS
from klein.settings import Settings


@dataclass(slots=True)
class Kind:
    """A way to be told of an image under way: small previews every `every` steps, and `decoded`
    ones of the VAE."""

    name: str
    every: int = 0
    decoded: int = 0
    seconds: list[float] = field(default_factory=list)
    received: list[int] = field(default_factory=list)


def kinds_of(every: list[int], partial: int) -> list[Kind]:
    small = [Kind(f"every {n} steps", every=n) for n in every]
    return [Kind("none"), *small, Kind(f"{partial} partial images", decoded=partial)]


def draw(
    pipe: KleinPipeline,
    spec: ModelSpec,
    kind: Kind,
    number: int,
    args: argparse.Namespace,
    show: Callable[[Preview], None],
) -> None:
    """One picture into the kind's figures; what is shown of it is not waited for."""
    device = str(pipe.parts.vae.device.type)
    width, height = args.size or (spec.native_size, spec.native_size)
    params = params_of(spec, number, Case(width, height, 0), args.steps)
    count = 0

    def receive(preview: Preview) -> None:
        nonlocal count
        count += 1
        show(preview)

    wanted = PreviewRequest(receive, kind.every, kind.decoded)
    previews = wanted if kind.every or kind.decoded else None
    wait(device)
    started = time.perf_counter()
    pipe.generate(Job(RequestContext(math.inf, previews=previews), params))
    wait(device)
    kind.seconds.append(time.perf_counter() - started)
    kind.received.append(count)


def measure(pipe: KleinPipeline, spec: ModelSpec, args: argparse.Namespace) -> list[Kind]:
    """Every kind once to warm up, then in turns."""
    kinds = kinds_of(args.every, args.partial)
    with ThreadPoolExecutor(1) as shower:

        def show(preview: Preview) -> None:
            shower.submit(encode, preview)

        for number in range((args.rounds + 1) * len(kinds)):
            draw(pipe, spec, kinds[number % len(kinds)], number, args, show)
    for kind in kinds:
        del kind.seconds[0], kind.received[0]
    return kinds


def encode(preview: Preview) -> None:
    if preview.decoded:
        images.encode(preview.picture, FORMATS["png"], 0, "")
    else:
        images.preview_uri(preview.picture, b"")


def table(kinds: list[Kind]) -> list[str]:
    """A row for each kind; the cost is the median over the rounds of the difference to none."""
    lines = [
        f"{'previews':<20}{'seconds':>9}{'from':>8}{'to':>8}{'cost ms':>9}{'cost %':>8}{'sent':>6}"
    ]
    bare = kinds[0].seconds
    for kind in kinds:
        cost = statistics.median(a - b for a, b in zip(kind.seconds, bare, strict=True))
        seconds = statistics.median(kind.seconds)
        lines.append(
            f"{kind.name:<20}{seconds:9.4f}{min(kind.seconds):8.3f}{max(kind.seconds):8.3f}"
            f"{cost * 1000:9.1f}{100 * cost / statistics.median(bare):8.2f}{kind.received[-1]:6}"
        )
    return lines


def size(text: str) -> tuple[int, int]:
    width, height = map(int, text.split("x"))
    return width, height


@torch.inference_mode()
def main() -> None:
    """Print a table for each tier."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--geometry", choices=NAMES, default="9B" if device == "cuda" else "nano")
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=["exact"])
    parser.add_argument("--size", type=size, help="such as 1024x1024")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--every", nargs="+", type=int, default=[PREVIEW_EVERY, 1])
    parser.add_argument("--partial", type=int, default=3, help="images that the VAE decodes")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    spec = MODELS[NAMES[args.geometry]]
    if device == "cuda":
        from klein.inference.acceleration import kernels

        kernels.keep_in(Settings().kernel_cache.expanduser())
    stock = stock_pipeline(spec, device)
    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
    for tier in args.tiers:
        pipe = served(stock, shell(stock.transformer), spec, device, tier)
        kinds = measure(pipe, spec, args)
        print(f"\n{spec.name}, {tier}, on {where}, {args.steps} steps, {args.rounds} rounds")
        print("\n".join(table(kinds)), flush=True)


if __name__ == "__main__":
    main()
