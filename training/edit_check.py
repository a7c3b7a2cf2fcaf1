"""How well klein-nano edits: results of instructions against drawings of what they should be.

The place, tilt and parting of every reference are known, so the judge draws the expected portrait
once for each value that an attribute can have and takes the value whose drawing is nearest to the
picture, in the pixels in which these drawings differ.
"""

from collections.abc import Iterable

import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from torch.nn import functional as F

from training.attributes import ATTRIBUTES, Batch, sample
from training.captions import Row, rows
from training.draw import LOOKS, draw, with_looks
from training.edits import Edit, Edits, make_combinations, make_edits
from training.model import TOKENS

JUDGED = 128
"""Side of the pictures that the judge compares, in pixels."""

FADED = {"freckles": 0.4}
"""The VAE shows freckles, two pixels wide, at about this share of their contrast."""

IDENTITY = ("who", "hair", "style", "skin", "eyes", "expression", "beard", "freckles")
OUTWARD = {
    "wear",
    "wear_color",
    "hat",
    "hat_color",
    "scarf",
    "scarf_color",
    "background",
    "pattern",
}
"""Clothing and background: instructions about nothing else must keep the identity."""

Shares = dict[str, float]


class ReferencePipeline(Flux2KleinPipeline):
    """The stock pipeline, but every prompt of a batch has references of its own.

    `image` lists the references of the first prompt, then those of the second, and so on.
    """

    def prepare_image_latents(
        self,
        images: list[torch.Tensor],
        batch_size: int,
        generator: list[torch.Generator],
        device: torch.device,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode each prompt's references as the stock pipeline encodes those of one prompt."""
        each, stock = len(images) // batch_size, super().prepare_image_latents
        made = [
            stock(images[start : start + each], 1, generator, device, dtype)
            for start in range(0, len(images), each)
        ]
        return torch.cat([latents for latents, _ in made]), torch.cat([ids for _, ids in made])


def as_pil(images: torch.Tensor) -> list[Image.Image]:
    """Pictures (N, 3, H, W) in 0..1 as PIL images."""
    arrays = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def edit_pictures(
    pipe: Flux2KleinPipeline,
    prompts: list[str],
    references: list[torch.Tensor],
    steps: int = 28,
    guidance: float = 2.5,
    seed: int = 3000,
    batch: int = 50,
) -> torch.Tensor:
    """Draw prompts with references (one tensor (N, 3, H, W) for each number) : (N, 3, 256, 256)."""
    own = ReferencePipeline(**pipe.components, is_distilled=False)
    own.set_progress_bar_config(disable=True)
    images, parts = [as_pil(one) for one in references], []
    for start in range(0, len(prompts), batch):
        some = range(start, min(start + batch, len(prompts)))
        made = own(
            image=[one[index] for index in some for one in images] or None,
            prompt=[prompts[index] for index in some],
            width=256,
            height=256,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator("cpu").manual_seed(seed + index) for index in some],
            max_sequence_length=TOKENS,
            output_type="pt",
        )
        parts.append(made.images.float().cpu())
    return torch.cat(parts)


def nearest(images: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Index (N,) of the candidate (V, N, 3, H, W) nearest to each picture, where they differ."""
    spread = (candidates.amax(0) - candidates.amin(0)).amax(1, keepdim=True)
    mask = (spread > 0.02).float()
    return ((candidates - images).abs() * mask).sum((2, 3, 4)).argmin(0)


def seen_values(
    images: torch.Tensor,
    targets: Batch,
    seed: int,
    device: torch.device | str,
    names: Iterable[str] = tuple(ATTRIBUTES),
) -> Batch:
    """The values of attributes that pictures (N, 3, 256, 256) show, as a batch.

    Args:
        images: results that have the place and tilt of `draw(..., seed)`.
        targets: what the pictures should show.
        seed: of the references.
        device: where to draw.
        names: of the attributes to look at.
    """
    small = F.interpolate(images, (JUDGED, JUDGED), mode="area").to(device)
    seen = {}
    for name in names:
        candidates = [
            draw(
                targets | {name: torch.full_like(targets[name], index)},
                seed,
                JUDGED,
                JUDGED,
                device,
            )
            for index in range(len(ATTRIBUTES[name]))
        ]
        stack = torch.stack(candidates)
        stack = torch.lerp(stack[:1], stack, FADED.get(name, 1.0))
        seen[name] = nearest(small, stack).cpu()
    return seen


def visible(name: str, before: Row, after: Row) -> bool:
    """Whether an attribute shows both in the reference and in the result."""
    both = (before, after)
    rules = {
        "hat_color": all(row["hat"] != "none" for row in both),
        "scarf_color": all(row["scarf"] != "none" for row in both),
        "eyes": all(row["glasses"] != "sunglasses" for row in both),
        "style": before["hat"] == "none",
        "beard": after["who"] == "man",
    }
    return rules.get(name, True)


def kept(seen: Batch, data: Edits) -> dict[str, torch.Tensor]:
    """For each attribute whether it was kept: 1 yes, 0 no, -1 not to be judged; (N,) each."""
    result = {}
    before, after = rows(data.sources), [edit.row for edit in data.edits]
    for name in ATTRIBUTES:
        judged = [
            name not in edit.changed and visible(name, old, new)
            for edit, old, new in zip(data.edits, before, after, strict=True)
        ]
        right = (seen[name] == data.targets[name]).long()
        result[name] = torch.where(torch.tensor(judged), right, -1)
    return result


def told(seen: Batch, data: Edits) -> torch.Tensor:
    """Whether everything that each instruction told (N,) is as told."""

    def right(index: int, edit: Edit, name: str) -> bool:
        value = int(seen[name][index])
        if name not in edit.loose:
            return value == int(data.targets[name][index])
        return name.endswith("_color") or value > 0

    return torch.tensor(
        [all(right(i, edit, name) for name in edit.changed) for i, edit in enumerate(data.edits)]
    )


def _share(marks: torch.Tensor) -> float:
    marks = marks[marks >= 0].float()
    return round(marks.mean().item(), 3) if len(marks) else float("nan")


def summary(seen: Batch, data: Edits) -> dict[str, float | Shares]:
    """Shares of what was told and what was kept, as figures."""
    keeps, right = kept(seen, data), told(seen, data)
    outward = torch.tensor([edit.changed <= OUTWARD for edit in data.edits])
    same = torch.stack([keeps[name] != 0 for name in IDENTITY]).all(0)
    by_name = {
        name: _share(right[torch.tensor([name in edit.changed for edit in data.edits])].long())
        for name in ATTRIBUTES
        if any(name in edit.changed for edit in data.edits)
    }
    return {
        "told": _share(right.long()),
        "told, by attribute in the instruction": by_name,
        "kept": {name: _share(marks) for name, marks in keeps.items()},
        "identity kept, clothing and background edits": _share(same[outward].long()),
    }


def reference_pictures(
    data: Edits, seed: int, device: torch.device | str, sizes: tuple[tuple[int, int], ...]
) -> list[torch.Tensor]:
    """The references of each edit in the order of its prompt, one tensor for each number."""
    first, *_ = shown = [draw(data.sources, seed, *size, device=device) for size in sizes]
    if data.others is None or data.looks is None:
        return [first]
    partners = [
        with_looks(draw(data.others, seed + 7, *size, device=device), data.looks) for size in sizes
    ]
    person = torch.tensor([edit.person for edit in data.edits], device=first.device)
    return [
        torch.where((person == number).view(-1, 1, 1, 1), own, other)
        for number, (own, other) in enumerate(zip(shown, partners, strict=True), start=1)
    ]


def look_right(images: torch.Tensor, data: Edits, seed: int, device: torch.device | str) -> float:
    """Share of the edits "in the style of" whose result has that look."""
    assert data.looks is not None
    small = F.interpolate(images, (JUDGED, JUDGED), mode="area").to(device)
    plain = draw(data.targets, seed, JUDGED, JUDGED, device)
    made = [with_looks(plain, torch.full_like(data.looks, look)) for look in range(len(LOOKS))]
    right = nearest(small, torch.stack(made)).cpu() == data.looks
    return _share(right[data.looks > 0].long())


def combination_summary(
    images: torch.Tensor, data: Edits, seed: int, device: torch.device | str
) -> dict[str, float | Shares]:
    """Shares of two-reference instructions that came out right, by what was taken over."""
    assert data.looks is not None
    plain = data.looks == 0
    seen = seen_values(images, data.targets, seed, device)
    right = told(seen, data)
    keeps = {name: marks.where(plain, -1) for name, marks in kept(seen, data).items()}
    things = [edit.borrowed[0] for edit in data.edits]
    shares = {
        thing: _share(right[torch.tensor([t == thing for t in things])].long())
        for thing in dict.fromkeys(things)
        if thing != "look"
    }
    shares["look"] = look_right(images, data, seed, device)
    share = sum(shares[thing] for thing in things) / len(things)
    swapped = torch.tensor([edit.person == 2 for edit in data.edits]) & plain
    return {
        "right": round(share, 3),
        "right, by what is taken over": shares,
        "right, the person in image 2": _share(right[swapped].long()),
        "kept": {name: _share(marks) for name, marks in keeps.items()},
    }


def edit_set(count: int) -> tuple[Edits, int]:
    """Held-out instructions for one reference, and the seed of their references."""
    return make_edits(sample(count, 7001, test=True), 7002, test=True), 7003


def combination_set(count: int) -> tuple[Edits, int]:
    """Held-out instructions for two references, and the seed of their references."""
    return make_combinations(sample(count, 7011, test=True), 7012, test=True), 7013
