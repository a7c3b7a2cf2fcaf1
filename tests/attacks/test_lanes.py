"""What hangs, hangs alone: a bucket, a disk, a picture that is long to encode."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from klein.app.generator import Generated, Generator
from klein.app.lanes import Lane
from klein.errors import DeliveryFailed, KleinError, LoraUnavailable
from klein.lora.library import LoraLibrary
from klein.output.delivery import Bucket
from klein.output.marks import Marks
from klein.output.response import to_json
from klein.settings import Secret
from klein.sources.cache import Store
from klein.sources.fetch import Fetcher
from tests.support import fakes, loras, pictures, servers


@pytest.fixture
def generator() -> Iterator[Generator]:
    made = fakes.generator(fakes.FakePipeline())
    yield made
    made.stop()


def _generated(return_type: str) -> Generated:
    delivery = replace(fakes.delivery(), return_type=return_type)
    return Generated(fakes.result(fakes.params()), delivery, Marks())


def test_a_bucket_that_stalls_stops_nobody_else(generator: Generator) -> None:
    """However many wait for it, others encode their images and list the LoRAs."""
    over = threading.Event()

    def stall(_: socket.socket) -> None:
        over.wait(30)

    with servers.raw(stall) as host:
        generator.bucket = Bucket(f"http://{host}", "b", Secret("a"), Secret("b"), 60)

        def render(generated: Generated) -> str:
            image = to_json(
                generated.result, generated.delivery, generated.marks, generator.bucket
            )["images"][0]
            return "url" if "url" in image else "base64"

        async def scenario() -> None:
            links = [generator.render(_generated("url"), render) for _ in range(20)]
            waiting = [asyncio.ensure_future(link) for link in links]
            await asyncio.sleep(0.5)
            began = time.monotonic()
            assert await generator.render(_generated("base64"), render) == "base64"
            assert await generator.lanes.files.run(generator.library.entries) == []
            assert time.monotonic() - began < 5
            assert not any(each.done() for each in waiting)
            for each in waiting:
                each.cancel()
            over.set()

        asyncio.run(scenario())


@pytest.mark.parametrize("field", ["loras", "images"])
def test_servers_that_drip_hold_up_nothing_that_is_at_hand(tmp_path: Path, field: str) -> None:
    """However many are asked: a LoRA in the folder and a picture in a request are used at once."""
    over = threading.Event()

    def drip(connection: socket.socket) -> None:
        while not over.wait(0.05):
            connection.sendall(b"H")

    tensors, metadata = loras.ai_toolkit({"single_blocks.0.linear1": (72, 8)})
    loras.write(tmp_path / "own.safetensors", tensors, metadata)
    with servers.raw(drip) as host:
        store = Store(tmp_path / "cache", 1e9, grace=0)
        library = LoraLibrary(tmp_path, store, Fetcher(frozenset({host})))
        generator = fakes.generator(fakes.FakePipeline(), library, KLEIN_FETCH_HOSTS=host)

        async def scenario() -> None:
            address = f"http://{host}/x"
            wanted = {"loras": [{"path": address}], "images": [address]}[field]
            slow = [
                asyncio.create_task(
                    generator.run(fakes.request(**{field: wanted}), generator.context())
                )
                for _ in range(6)
            ]
            await asyncio.sleep(0.3)
            own = fakes.request(
                prompt="quick",
                loras=[{"path": "own.safetensors"}],
                images=[pictures.text(pictures.noise(64, 64))],
            )
            drawn = await asyncio.wait_for(generator.run(own, generator.context()), 5)
            assert drawn.result.params.prompt == "quick"
            for each in slow:
                assert not each.done()
                each.cancel()
            await asyncio.wait(slow)

        asyncio.run(scenario())
        over.set()
        generator.stop()


@pytest.mark.parametrize("late", [DeliveryFailed, LoraUnavailable])
def test_nobody_waits_longer_than_a_lane_says(late: type[KleinError]) -> None:
    """Whether the work has begun or not; the error can be retried, and the lane goes on after."""
    gate = threading.Event()
    lane = Lane("test", 1, 0.2, lambda: late("late"))

    async def scenario() -> None:
        began = time.monotonic()
        both = await asyncio.gather(
            *[lane.run(gate.wait) for _ in range(2)], return_exceptions=True
        )
        assert time.monotonic() - began < 5
        for error in both:
            assert isinstance(error, late)
            assert error.retryable
        gate.set()
        assert await lane.run(lambda: 3, seconds=5) == 3

    asyncio.run(scenario())
    lane.stop()
