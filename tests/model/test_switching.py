"""Many switches: nothing grows, nothing drifts, nothing recompiles.

`python -m tests.model.test_switching 1000` is the long form.
"""

import gc
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from klein.inference.adapters.merge import AdapterRequest, LoraMerger
from klein.inference.pipeline import KleinPipeline
from klein.lora import file
from tests.model.conftest import load
from tests.model.stock import stock
from tests.support import loras, tiny

COUNT = 20


def _twenty(folder: Path) -> list[AdapterRequest]:
    """Different ranks, half of them on half of the layers."""
    shapes = loras.layers(tiny.HIDDEN)
    made = []
    for number in range(COUNT):
        some = dict(list(shapes.items())[:: 1 + number % 2])
        tensors, metadata = loras.ai_toolkit(some, rank=2 + number, seed=100 * number)
        path = loras.write(folder / f"{number}.safetensors", tensors, metadata)
        made.append(AdapterRequest(path.name, file.inspect(path, path.name), 0.5 + number / 20))
    return made


def _tensors() -> int:
    gc.collect()
    return sum(type(thing) in _KINDS for thing in gc.get_objects())


_KINDS = (torch.Tensor, torch.nn.Parameter)


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], weight) for name, weight in b.items())


def switch(pipe: KleinPipeline, folder: Path, switches: int) -> dict[str, float]:
    """Switch at random among base, single LoRAs and pairs; returns what it cost."""
    transformer = pipe.parts.transformer
    merger, requests = LoraMerger(transformer, pipe.info.spec), _twenty(folder)

    def weights() -> dict[str, torch.Tensor]:
        return {name: weight.clone() for name, weight in transformer.state_dict().items()}

    merger.apply([])
    expected: dict[tuple[int, ...], dict[str, torch.Tensor]] = {(): weights()}
    for number, one in enumerate(requests):
        merger.apply([one])
        expected[(number,)] = weights()
    before, seconds, pick = _tensors(), [], random.Random(1)
    for _ in range(switches):
        chosen = tuple(pick.sample(range(COUNT), pick.choice((0, 1, 1, 1, 2))))
        started = time.perf_counter()
        merger.apply([requests[i] for i in chosen])
        seconds.append(time.perf_counter() - started)
        if chosen in expected:
            assert _equal(weights(), expected[chosen])
    grown = _tensors() - before
    merger.apply([])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"ms a switch": 1000 * sum(seconds) / len(seconds), "tensors grown": grown, "MB": peak}


def test_many_switches_among_twenty(tiny_folder: Path, tmp_path: Path) -> None:
    """Each LoRA gives bit-identical weights each time, base is base, no tensor stays behind."""
    figures = switch(load(tiny_folder), tmp_path, 120)
    assert figures["tensors grown"] <= 0


def test_switching_never_recompiles(tiny_folder: Path, tmp_path: Path) -> None:
    """The compiled blocks read their weights where they lie; only the numbers change."""
    pipe = load(tiny_folder)
    transformer, graphs = pipe.parts.transformer, 0

    def counting(module: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return module.forward

    torch._dynamo.reset()
    transformer.compile_repeated_blocks(backend=counting, fullgraph=True)
    merger, requests = LoraMerger(transformer, pipe.info.spec), _twenty(tmp_path)

    over_klein = stock(tiny_folder, transformer=transformer)

    def forward() -> torch.Tensor:
        out = over_klein(
            prompt="x",
            width=64,
            height=64,
            num_inference_steps=1,
            max_sequence_length=64,
            generator=torch.Generator("cpu").manual_seed(1),
            output_type="latent",
        )
        return torch.as_tensor(out.images)

    base = forward()
    compiled = graphs
    assert compiled > 0
    for chosen in ([0], [5], [], [3, 7], [3]):
        merger.apply([requests[i] for i in chosen])
        changed = not torch.equal(forward(), base)
        assert changed == bool(chosen)
    assert graphs == compiled
    torch._dynamo.reset()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        (place / "loras").mkdir()
        model = load(tiny.save(place / "tiny"))
        print(switch(model, place / "loras", int(sys.argv[1])))
