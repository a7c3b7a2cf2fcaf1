import copy
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, Qwen3ForCausalLM

from klein.inference.loading import modules, reader
from klein.models.identify import NANO_FOLDER
from tests.support import tiny

CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
)
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
F32, BF16 = torch.float32, torch.bfloat16


def everything(_: str) -> bool:
    return True


@pytest.fixture(scope="module")
def pipe() -> Flux2KleinPipeline:
    """The tiny pipeline with statistics in its VAE that are not those a constructor gives."""
    made = tiny.build()
    norm = made.vae.bn
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.num_batches_tracked.fill_(7)
    return made


@pytest.fixture(scope="module", params=["whole", "sharded"])
def folder(
    pipe: Flux2KleinPipeline, tmp_path_factory: pytest.TempPathFactory, request: Any
) -> Path:
    """It saved: float32, in one file a part, or in shards of 20 kB."""
    to = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(to, max_shard_size="20KB" if request.param == "sharded" else "5GB")
    shards = list(to.glob("*/*-of-*.safetensors"))
    assert len(shards) > 6 if request.param == "sharded" else not shards
    return to


def encoder_config(folder: Path, layers: int = 27) -> Any:
    config = AutoConfig.from_pretrained(folder, subfolder="text_encoder")
    config.num_hidden_layers = layers
    config.layer_types = config.layer_types[:layers]
    return config


def stock(part: str, folder: Path, dtype: torch.dtype, device: str = "cpu") -> Any:
    """What the libraries load, cut as klein cuts it."""
    if part != "text_encoder":
        kind = {"transformer": Flux2Transformer2DModel, "vae": AutoencoderKLFlux2}[part]
        return kind.from_pretrained(folder, subfolder=part, torch_dtype=dtype).to(device)
    made = Qwen3ForCausalLM.from_pretrained(
        folder, subfolder=part, config=encoder_config(folder), dtype=dtype
    )
    made.model.norm = torch.nn.Identity()
    made.lm_head = torch.nn.Identity()
    return made.to(device)


def load(part: str, folder: Path, dtype: torch.dtype, device: str = "cpu") -> Any:
    if part == "text_encoder":
        return modules.text_encoder(folder / part, encoder_config(folder), device, dtype)
    return getattr(modules, part)(folder / part, device, dtype)


def settings(model: Any) -> dict[str, Any]:
    """The configuration, but for where it was read."""
    config = model.config
    known = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {name: value for name, value in known.items() if name != "_name_or_path"}


def tensors(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers, those included that no file holds."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def assert_same(made: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert made.keys() == expected.keys()
    for name, one in expected.items():
        assert (made[name].dtype, made[name].device) == (one.dtype, one.device), name
        assert torch.equal(made[name], one), name


@DEVICES
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae"])
def test_a_part_is_from_pretraineds_bit_for_bit(
    part: str, dtype: torch.dtype, device: str, folder: Path
) -> None:
    """Every parameter and buffer, also statistics and those that no file holds, and their types."""
    assert_same(
        tensors(load(part, folder, dtype, device)), tensors(stock(part, folder, dtype, device))
    )


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae"])
def test_nano_is_from_pretraineds_bit_for_bit(part: str, dtype: torch.dtype) -> None:
    """The trained model that comes with klein: bfloat16 files, read as they are and as float32."""
    nano = NANO_FOLDER / "model"
    assert_same(tensors(load(part, nano, dtype)), tensors(stock(part, nano, dtype)))


@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae"])
def test_parts_are_for_inference(part: str, folder: Path) -> None:
    """In eval mode all through, without gradients, and of the configuration they came with."""
    made = load(part, folder, F32)
    assert not any(module.training for module in made.modules())
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert settings(made) == settings(stock(part, folder, F32))
    assert made.dtype == F32


def test_the_states_that_are_read_are_stock(folder: Path) -> None:
    """Attention, positions and their types are those of the library's own model."""
    ids = torch.arange(40)[None]
    whole = Qwen3ForCausalLM.from_pretrained(folder, subfolder="text_encoder", dtype=BF16)
    with torch.no_grad():
        expected = whole(ids, output_hidden_states=True).hidden_states
        made = load("text_encoder", folder, BF16)(ids, output_hidden_states=True).hidden_states
    assert all(torch.equal(made[layer], expected[layer]) for layer in (0, 9, 18, 27))


def test_the_end_of_the_text_encoder_is_not_read() -> None:
    """Neither the head, which is a model's largest tensor, nor the last norm and later layers."""
    wanted = modules.layers_below(9)
    assert wanted("model.embed_tokens.weight")
    assert wanted("model.layers.8.input_layernorm.weight")
    assert not wanted("model.layers.9.input_layernorm.weight")
    assert not wanted("model.layers.80.mlp.up_proj.weight")
    assert not wanted("model.norm.weight")
    assert not wanted("lm_head.weight")


def test_the_callers_config_is_left_alone(folder: Path) -> None:
    """The same config serves twice, for two types of numbers."""
    config = encoder_config(folder)
    before = copy.deepcopy(config.to_dict())
    modules.text_encoder(folder / "text_encoder", config, "cpu", BF16)
    assert config.to_dict() == before


# -- files -------------------------------------------------------------------------------------


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file with the tensors in the order given: the library would align them."""
    names = {value: key for key, value in reader.DTYPES.items()}
    header, begin = {}, 0
    for name, tensor in tensors.items():
        end = begin + tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    raw = json.dumps(header).encode()
    data = (bytes(x.reshape(-1).view(torch.uint8).numpy()) for x in tensors.values())
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(data))


def odd_tensors() -> dict[str, Tensor]:
    """Every type, in sizes from nothing to several chunks, so that most lie unaligned."""
    torch.manual_seed(0)
    shapes = [(), (3,), (0,), (1, 5), (7, 11, 3)]
    return {
        f"{name}{shape}": (torch.randn(shape) * 9).to(dtype)
        for shape in shapes
        for name, dtype in sorted(reader.DTYPES.items())
    }


@DEVICES
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
@pytest.mark.parametrize("chunk", [8, 61, 4096, 32 * 1024**2])
def test_any_mix_of_types_and_sizes(
    dtype: torch.dtype,
    chunk: int,
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Floating point becomes the type asked for, all else stays; wherever the chunks end."""
    monkeypatch.setattr(reader, "CHUNK_BYTES", chunk)
    given = odd_tensors()
    write(tmp_path / "model.safetensors", given)
    made = reader.read(tmp_path, device, dtype, everything)
    assert all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in made.values())
    assert_same(
        {name: tensor.cpu() for name, tensor in made.items()},
        {n: x.to(dtype) if x.is_floating_point() else x for n, x in given.items()},
    )


class LateStream:
    """A GPU's stream as far as reading needs it: copies happen later, in order, on a thread."""

    def __init__(self, *_: Any) -> None:
        self.device = torch.device("cpu")
        self.queue = ThreadPoolExecutor(1)

    def wait_stream(self, _: Any) -> None:
        self.synchronize()

    def synchronize(self) -> None:
        self.queue.submit(time.sleep, 0).result()


class LateEvent:
    """Recorded on a LateStream, done when what was queued before it is."""

    def __init__(self, stream: LateStream) -> None:
        self.stream = stream
        self.done: Future[None] | None = None

    def record(self) -> None:
        self.done = self.stream.queue.submit(time.sleep, 0)

    def synchronize(self) -> None:
        if self.done:
            self.done.result()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Reading goes as it does to a GPU, whose copies come late; the buffers made are listed."""
    stream = LateStream()
    made: list[int] = []
    land = reader.Piece.land

    def later(piece: Any, raw: Tensor) -> None:
        def late() -> None:
            time.sleep(0.0005)
            land(piece, raw.clone())

        stream.queue.submit(late)

    def buffer() -> tuple[Tensor, LateEvent]:
        made.append(reader.CHUNK_BYTES)
        return torch.empty(reader.CHUNK_BYTES, dtype=torch.uint8), LateEvent(stream)

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(reader.Piece, "land", later)
    monkeypatch.setattr(reader, "new_buffer", buffer)
    monkeypatch.setattr(reader, "mover", lambda device: reader.Staging(device).move)
    return made


def test_a_buffer_is_not_filled_before_it_is_emptied(
    tmp_path: Path, late: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late the device takes its copies; and when reading ends they are all there."""
    monkeypatch.setattr(reader, "CHUNK_BYTES", 64)
    given = {f"{i}": torch.randn(11 + i % 7).to((F32, BF16)[i % 2]) for i in range(300)}
    write(tmp_path / "model.safetensors", given)
    made = stage(tmp_path)
    assert_same(made, {name: tensor.to(BF16) for name, tensor in given.items()})
    assert 1 <= len(late) <= reader.BUFFERS


def test_a_read_that_fails_ends_the_others(
    tmp_path: Path, late: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A buffer goes back whatever happens: nobody waits for it for ever."""
    monkeypatch.setattr(reader, "CHUNK_BYTES", 8)
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    write(tmp_path / "model.safetensors", {"a": torch.randn(1000)})
    with pytest.raises(ValueError, match="it ends at byte"):
        stage(tmp_path)


def stage(folder: Path) -> dict[str, Tensor]:
    """The tensors in `folder` as bfloat16, read through buffers as for a GPU."""
    return reader.read(folder, "cpu", BF16, everything)


def test_chunks_are_large_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours share a read; what is not wanted ends it; nothing is read twice or for nothing."""
    given = {f"{i}": torch.full((10,), i, dtype=F32) for i in range(100)}
    write(tmp_path / "model.safetensors", given)
    reads = record(monkeypatch)
    made = reader.read(tmp_path, "cpu", F32, lambda name: name not in ("0", "50"))
    assert len(reads) == 2
    assert sum(reads) == 98 * 40
    assert made.keys() == given.keys() - {"0", "50"}


def record(monkeypatch: pytest.MonkeyPatch, most: int = 2**40) -> list[int]:
    """The sizes of all reads from now on, of which none gives more than `most` bytes."""
    real, sizes = os.preadv, []

    def preadv(fd: int, views: Sequence[memoryview], offset: int) -> int:
        first: list[memoryview] = []
        for view in views:
            first.append(view[: most - sum(map(len, first))])
        sizes.append(real(fd, first, offset))
        return sizes[-1]

    monkeypatch.setattr(os, "preadv", preadv)
    return sizes


@pytest.mark.parametrize("most", [1, 7, 50])
def test_short_reads_go_on(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network volume may give less than was asked for."""
    given = {"a": torch.randn(5), "b": torch.randn(1), "c": torch.randn(40).to(BF16)}
    write(tmp_path / "model.safetensors", given)
    record(monkeypatch, most)
    made = reader.read(tmp_path, "cpu", F32, everything)
    assert_same(made, {name: tensor.to(F32) for name, tensor in given.items()})


def test_only_shards_with_something_wanted_are_opened(tmp_path: Path) -> None:
    """The rest need not even be there."""
    save_file({"a": torch.ones(3), "b": torch.zeros(3)}, tmp_path / "model-1-of-2.safetensors")
    shards = {"a": "model-1-of-2.safetensors", "b": "model-1-of-2.safetensors", "c": "gone"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    made = reader.read(tmp_path, "cpu", BF16, lambda name: name == "a")
    assert_same(made, {"a": torch.ones(3, dtype=BF16)})


def test_files_can_be_named(tmp_path: Path) -> None:
    """Instead of a folder, files of any name."""
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "y.safetensors")
    made = reader.read(sorted(tmp_path.iterdir()), "cpu", F32, everything)
    assert made.keys() == {"a", "b"}


def header(table: Any, data: int = 0) -> bytes:
    raw = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(data)


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (2**63).to_bytes(8, "little"),
        (9).to_bytes(8, "little") + b"{}",
        header(b"not json"),
        header(b"[" * 100_000),
        header([]),
        header({"a": 1}),
        header({"a": {}}),
        header(entry(), data=7),
        header(entry(), data=9),
        header(entry(shape=[3]), data=8),
        header(entry(shape=[-1, -2]), data=8),
        header(entry(shape=[2.0]), data=8),
        header(entry(shape="2"), data=8),
        header(entry(data_offsets=[-8, 0]), data=8),
        header(entry(data_offsets=[8, 0]), data=8),
        header(entry(data_offsets=[0]), data=8),
        header(entry(dtype="F4"), data=8),
        header(entry(dtype=[1]), data=8),
    ],
)
def test_damaged_files_are_named(content: bytes, tmp_path: Path) -> None:
    """Before a tensor is read, with the way out, and without where on this machine they are."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="download it again") as caught:
        reader.read(tmp_path, "cpu", F32, everything)
    assert f"{tmp_path.name}/model.safetensors is cut off or damaged" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the file is an error, not zeros and not a loop; the other reads stop."""
    write(tmp_path / "model.safetensors", {"a": torch.randn(1000)})
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    monkeypatch.setattr(reader, "CHUNK_BYTES", 8)
    with pytest.raises(ValueError, match=r"model\.safetensors is cut off or damaged: it ends at"):
        reader.read(tmp_path, "cpu", F32, everything)


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": []}}']
)
def test_a_damaged_index_is_named(index: str, tmp_path: Path) -> None:
    """It is a file to download again like the others."""
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is cut off or damaged"):
        reader.read(tmp_path, "cpu", F32, everything)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    """Names the folder, and what to do."""
    with pytest.raises(ValueError, match=r"no safetensors weights in .* download the model again"):
        reader.read(tmp_path, "cpu", F32, everything)


@pytest.fixture
def altered(pipe: Flux2KleinPipeline, tmp_path: Path) -> Callable[..., Path]:
    """The transformer's folder with other weights or configuration."""

    def make(change: Callable[[dict[str, Tensor]], object], **config: Any) -> Path:
        pipe.transformer.save_pretrained(tmp_path)
        weights = dict(pipe.transformer.state_dict())
        change(weights)
        save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
        known = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(known | config))
        return tmp_path

    return make


def test_missing_tensors_are_named(altered: Callable[..., Path]) -> None:
    """A model is never run with weights that nobody wrote."""
    folder = altered(lambda weights: weights.pop("proj_out.weight"))
    with pytest.raises(ValueError, match=r"lack 1 tensors, proj_out\.weight among them"):
        modules.transformer(folder, "cpu", F32)


def test_other_tensors_are_let_go(altered: Callable[..., Path]) -> None:
    """As from_pretrained does."""
    folder = altered(lambda weights: weights.update(more=torch.ones(1)))
    assert "more" not in dict(modules.transformer(folder, "cpu", F32).state_dict())


def test_other_shapes_are_refused(altered: Callable[..., Path]) -> None:
    """The weights of another model are an error, with the tensor's name."""
    folder = altered(lambda weights: weights.update({"proj_out.weight": torch.ones(3, 3)}))
    with pytest.raises(RuntimeError, match=r"size mismatch for proj_out\.weight"):
        modules.transformer(folder, "cpu", F32)


def test_quantised_weights_are_refused(altered: Callable[..., Path]) -> None:
    """Their numbers mean nothing without what unpacks them."""
    folder = altered(len, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match=re.escape("use the model's bfloat16 weights")):
        modules.transformer(folder, "cpu", F32)


def test_statistics_may_lack_their_counter(pipe: Flux2KleinPipeline, tmp_path: Path) -> None:
    """The counter of a normalisation is for training; the statistics themselves must be there."""
    pipe.vae.save_pretrained(tmp_path)
    weights = dict(pipe.vae.state_dict())
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    del weights["bn.num_batches_tracked"]
    save_file(weights, file)
    assert torch.equal(modules.vae(tmp_path, "cpu", F32).bn.running_var, pipe.vae.bn.running_var)
    del weights["bn.running_var"]
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"bn\.running_var"):
        modules.vae(tmp_path, "cpu", F32)
