"""What makes pictures come faster: one row each, in the order they are put on, and the tiers.

A tier is what an operator chooses (KLEIN_SPEED), and a request among those that the server's
weights can serve; but for what is `optional` it is in force whole or not at all.
"""

from collections.abc import Set
from dataclasses import dataclass

from klein.errors import ModelUnavailable
from klein.models.samplers import SAMPLERS

Capability = tuple[int, int]
"""An NVIDIA GPU's compute capability: (9, 0) is Hopper."""

SITUATIONS = {
    "model": "model offload moves weights about, and their place must not change",
    "float8_model": "model offload moves float8 weights about, and their place must not change",
    "sequential": "sequential offload keeps the weights where kernels cannot read them",
    "distilled": "the model is distilled to a few steps, and none of them can be left out",
}
"""What can be in an option's way besides the GPU."""


@dataclass(frozen=True, slots=True)
class Option:
    """One way to be faster. `exact`: only the order of floating-point operations differs.

    `needs` are options that must be on before it, `excludes` are SITUATIONS, `capability` is the
    least of a GPU. One that is `optional` is left out where it cannot be, and the tier stands.
    One that is `per_run` needs nothing of the start, so any run can have it; what `needs_originals`
    to be left out again acts in place of weights, and what is `lasting` keeps none to go back to.
    """

    name: str
    exact: bool
    doc: str
    needs: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    capability: Capability = (8, 0)
    optional: bool = False
    per_run: bool = False
    needs_originals: bool = False
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class Tier:
    """A named set of options."""

    name: str
    options: tuple[str, ...]
    doc: str

    @property
    def exact(self) -> bool:
        """Whether pictures equal the eager tier's but for floating-point order."""
        return all(OPTIONS[name].exact for name in self.options)


@dataclass(frozen=True, slots=True)
class StepSkipping:
    """Which steps are computed when not all are: the `first` (two or more), every `every`-th after
    them, and the last. In the others the velocity is extrapolated linearly over the noise levels,
    from the last two that were computed."""

    first: int
    every: int

    def computes(self, step: int, steps: int) -> bool:
        """Whether step `step` of `steps`, from 0, is computed."""
        after = step - self.first
        return after < 0 or after % self.every == 0 or step == steps - 1

    def computed(self, steps: int) -> int:
        """How many of `steps` are computed."""
        return sum(self.computes(step, steps) for step in range(steps))


@dataclass(frozen=True, slots=True)
class Acceleration:
    """What is in force. `why` says what kept klein from a faster choice of its own."""

    tier: Tier
    options: tuple[str, ...]
    why: str = ""

    def has(self, option: str) -> bool:
        """Whether the option is on."""
        return option in self.options


STEP_SKIPPING = StepSkipping(first=3, every=2)
"""28 steps become 16: SPEED.md has what others cost."""

_SKIPS_FROM = ", ".join(
    f"{row.skips_from} steps or more ({row.name})" for row in SAMPLERS.values() if row.skips_from
)

OPTIONS: dict[str, Option] = {
    row.name: row
    for row in (
        Option(
            "fused",
            True,
            "what lies between the matrix products of a block runs as four Triton kernels",
            excludes=("sequential",),
        ),
        Option(
            "batched_cfg",
            True,
            "both branches of guidance run as one batch",
            needs=("fused",),
        ),
        Option(
            "decoder",
            True,
            "the VAE decodes channels last, with norm and activation in one kernel",
            excludes=("sequential",),
        ),
        Option(
            "cuda_graph",
            True,
            "the text encoder runs as one CUDA graph",
            excludes=("model", "float8_model", "sequential"),
            optional=True,
        ),
        Option(
            "float8",
            False,
            "matrix products of the blocks run in float8, row by row; LoRAs are merged in full "
            "precision first",
            needs=("fused",),
            excludes=("model", "sequential"),
            capability=(8, 9),
            needs_originals=True,
        ),
        Option(
            "float8_text",
            False,
            "so do those of the text encoder, whose weights are kept in float8 alone; "
            "`KLEIN_TEXT_ENCODER=bfloat16` leaves it out",
            needs=("fused",),
            excludes=("model", "sequential"),
            capability=(8, 9),
            optional=True,
            lasting=True,
        ),
        Option(
            "step_skipping",
            False,
            f"after {STEP_SKIPPING.first} steps only every other one and the last are computed, "
            f"in runs of {_SKIPS_FROM}",
            excludes=("distilled",),
            capability=(0, 0),
            per_run=True,
        ),
    )
}

EXACT = ("fused", "batched_cfg", "decoder", "cuda_graph")

TIERS: dict[str, Tier] = {
    row.name: row
    for row in (
        Tier("eager", (), "diffusers as it is"),
        Tier("eager_skipping", ("step_skipping",), "eager with the forwards of turbo"),
        Tier("exact", EXACT, "the same pictures, sooner"),
        Tier("exact_skipping", (*EXACT, "step_skipping"), "exact with the forwards of turbo"),
        Tier("fast", (*EXACT, "float8", "float8_text"), "nearly the same pictures"),
        Tier(
            "turbo",
            (*EXACT, "float8", "float8_text", "step_skipping"),
            "fewer forwards: pictures differ in detail",
        ),
    )
}


def situation(offload: str, *, distilled: bool = False, float8: bool = False) -> frozenset[str]:
    """Those of SITUATIONS that hold; `float8` says that there are no bfloat16 weights to offload.
    An offload of "none" is none of them."""
    placed = "float8_model" if float8 and offload == "model" else offload
    return frozenset({placed, "distilled"} if distilled else {placed}) & SITUATIONS.keys()


def wanted(
    speed: str, device: str, capability: Capability = (9, 0), *, float8: bool = False
) -> Tier:
    """The tier that a setting asks for on a device; `auto` keeps float8 weights as they are where
    the GPU can."""
    if speed == "auto":
        fast = float8 and capability >= OPTIONS["float8"].capability
        speed = "eager" if device == "cpu" else "fast" if fast else "exact"
    return TIERS[speed]


def choose(
    speed: str,
    device: str,
    capability: Capability,
    situation: frozenset[str],
    *,
    float8: bool = False,
    without: Set[str] = frozenset(),
) -> Acceleration:
    """The tier in force; `situation` are those of SITUATIONS that hold, `float8` says that the
    weights come so, `without` names optional options that the operator does without.

    A tier named in the setting is refused with ModelUnavailable where it cannot be; `auto` falls
    back to eager and says why.
    """
    tier = wanted(speed, device, capability, float8=float8)
    obstacle = _obstacle(tier, device, capability, situation)
    if obstacle is None:
        kept = (x for x in tier.options if x not in without and _fits(OPTIONS[x], situation))
        return Acceleration(tier, tuple(kept))
    if speed == "auto":
        return eager(f"{tier.name} cannot be used: {obstacle}")
    best = next(
        other.name
        for other in reversed(TIERS.values())
        if set(other.options) <= set(tier.options)
        and _obstacle(other, device, capability, situation) is None
    )
    raise ModelUnavailable(
        f"KLEIN_SPEED={speed} cannot be used: {obstacle}; KLEIN_SPEED={best} can",
        field="KLEIN_SPEED",
    )


def offered(
    server: Acceleration, situation: Set[str], *, originals: bool
) -> dict[str, Acceleration]:
    """What a request may choose from where `server` is in force, by the tiers' names.

    `situation` are those of SITUATIONS that hold; `originals` says that full weights are on the
    device beside those that an option acts through in their place.
    """
    per_run = {o.name for o in OPTIONS.values() if o.per_run and _fits(o, situation)}
    able = per_run.union(server.options)
    fixed = {
        name
        for name in server.options
        if OPTIONS[name].lasting or (OPTIONS[name].needs_originals and not originals)
    }
    return {
        tier.name: Acceleration(tier, tuple(name for name in tier.options if name in able))
        for tier in TIERS.values()
        if fixed <= set(tier.options)
        and all(name in able for name in tier.options if not OPTIONS[name].optional)
    }


def eager(why: str) -> Acceleration:
    """diffusers as it is, because of `why`."""
    return Acceleration(TIERS["eager"], (), why)


def excludes(tier: Tier, situation: Set[str]) -> bool:
    """Whether the tier cannot be had where those of SITUATIONS hold."""
    options = (OPTIONS[name] for name in tier.options)
    return any(not _fits(option, situation) for option in options if not option.optional)


def _fits(option: Option, situation: Set[str]) -> bool:
    return not situation & set(option.excludes)


def _obstacle(
    tier: Tier, device: str, capability: Capability, situation: frozenset[str]
) -> str | None:
    for option in map(OPTIONS.__getitem__, tier.options):
        if option.optional:
            continue
        if device == "cuda" and capability < option.capability:
            return (
                f"{option.name} needs compute capability {_dotted(option.capability)} and the GPU "
                f"has {_dotted(capability)}"
            )
        for excluded in option.excludes:
            if excluded in situation:
                return f"{option.name} is out of reach, because {SITUATIONS[excluded]}"
    return None


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))
