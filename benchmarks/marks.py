"""What marks and a filter cost, in milliseconds an image of 1024×1024, beside writing the file.

    python -m benchmarks.marks                        # a Markdown table; seconds, no model

The image is smooth with some noise, as a photograph is. Signing is with P-256, an edit's with two
pictures of the same size as its ingredients; the filter does nothing.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from klein.app.filter import Filter
from klein.core import Delivery, EditInputs, GeneratedImage, InputImage
from klein.output import response
from klein.output.marks import Marks
from klein.request.formats import FORMATS
from klein.settings import Settings
from tests.support import certificates, fakes, pictures

SIDE = 1024


def photograph() -> Image.Image:
    """Gradients and fine noise."""
    smooth = [
        Image.linear_gradient("L").rotate(angle).resize((SIDE, SIDE)) for angle in (0, 90, 180)
    ]
    noise = Image.effect_noise((SIDE, SIDE), 6)
    return Image.merge("RGB", [ImageChops.add(each, noise, 2) for each in smooth])


def milliseconds(work: Callable[[], Any], times: int) -> float:
    """The median of `times` runs after one that is not counted."""
    work()
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return 1000 * statistics.median(taken)


def mark_alone(delivery: Delivery, times: int) -> float:
    """Of an image so small that writing it takes no time."""
    tiny = fakes.result(fakes.params(width=64, height=64))
    without, marked = (
        milliseconds(partial(response.encode, tiny, delivery, Marks(ai)), times)
        for ai in (False, True)
    )
    return marked - without


def table(times: int, signed: Marks) -> Iterator[str]:
    """The lines of a Markdown table, a row for each format."""
    look = photograph()
    job = fakes.job(width=SIDE, height=SIDE, prompt="x")
    result = replace(fakes.result(job.params), images=(GeneratedImage(1, look),))
    sent = InputImage(look, "", SIDE, SIDE, pictures.data(look))
    edit = replace(result, inputs=EditInputs((sent,), sent))
    yield "| format | file | AI mark | C2PA | C2PA of an edit | bytes: mark, manifest |"
    yield "|---|---|---|---|---|---|"
    for name, fmt in FORMATS.items():
        delivery = fakes.delivery(output_format=name)
        (plain,), (marked,) = (response.encode(result, delivery, Marks(ai)) for ai in (False, True))
        costs = [
            milliseconds(partial(response.encode, result, delivery, Marks(False)), times),
            mark_alone(delivery, 20 * times),
            milliseconds(partial(signed.sign, marked.data, fmt.mime_type, result), times),
            milliseconds(partial(signed.sign, marked.data, fmt.mime_type, edit), times),
        ]
        manifest = signed.sign(marked.data, fmt.mime_type, result)
        sizes = len(marked.data) - len(plain.data), len(manifest) - len(marked.data)
        told = " | ".join(f"{cost:.2f}" for cost in costs)
        yield f"| {name} | {told} | {sizes[0]}, {sizes[1]} |"
    idle = Filter("idle", lambda _: None, 30)
    cost = milliseconds(lambda: asyncio.run(idle.check_images(job, result)), times)
    loop = milliseconds(lambda: asyncio.run(asyncio.sleep(0)), times)
    yield f"\nA filter that does nothing: {cost - loop:.1f} ms an image."


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=15)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chain = certificates.chain(Path(folder))
        signed = Marks.from_settings(Settings.from_env(chain.settings))
        for line in table(args.times, signed):
            print(line, flush=True)


if __name__ == "__main__":
    main()
