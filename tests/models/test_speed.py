"""The table of speed options: its order, its conflicts, and what a setting gets."""

from itertools import pairwise

import pytest

from klein.errors import BadSetting, ModelUnavailable
from klein.models import speed as acceleration
from klein.models.speed import OPTIONS, SITUATIONS, STEP_SKIPPING, TIERS, StepSkipping
from klein.settings import Settings

HOPPER = (9, 0)
NOTHING: frozenset[str] = frozenset()


@pytest.mark.parametrize("tier", TIERS.values(), ids=lambda tier: tier.name)
def test_a_tiers_options_are_in_the_tables_order(tier: acceleration.Tier) -> None:
    """So that each finds what it needs already on."""
    order = list(OPTIONS)
    assert list(tier.options) == sorted(tier.options, key=order.index)
    for name in tier.options:
        before = tier.options[: tier.options.index(name)]
        assert set(OPTIONS[name].needs) <= set(before)


def test_the_table_names_only_what_there_is() -> None:
    """Options need options and exclude situations."""
    for option in OPTIONS.values():
        assert set(option.needs) <= set(OPTIONS)
        assert set(option.excludes) <= set(SITUATIONS)


def test_each_tier_adds_to_the_one_before() -> None:
    """A faster tier never leaves out what a slower one has, with step skipping and without."""
    for names in (
        ("eager", "exact", "fast", "turbo"),
        ("eager_skipping", "exact_skipping", "turbo"),
    ):
        for slower, faster in pairwise(TIERS[name] for name in names):
            assert set(slower.options) < set(faster.options)
    assert [tier.name for tier in TIERS.values() if tier.exact] == ["eager", "exact"]


BF16 = ["eager", "eager_skipping", "exact", "exact_skipping"]


@pytest.mark.parametrize(
    ("server", "situation", "originals", "offered"),
    [
        ("eager", NOTHING, True, BF16[:2]),
        ("eager_skipping", frozenset({"sequential"}), True, BF16[:2]),
        ("exact", NOTHING, True, BF16),
        ("exact", frozenset({"model"}), True, BF16),
        ("exact", frozenset({"distilled"}), True, ["eager", "exact"]),
        ("fast", NOTHING, False, ["fast", "turbo"]),
        ("turbo", NOTHING, False, ["fast", "turbo"]),
        ("fast", NOTHING, True, list(TIERS)),
        ("fast", frozenset({"distilled"}), True, ["eager", "exact", "fast"]),
    ],
)
def test_a_request_may_name_what_the_weights_serve(
    server: str, situation: frozenset[str], originals: bool, offered: list[str]
) -> None:
    """float8 only where it is, full weights only where they are, step skipping but for distilled
    models; each with the options that the server has of the tier's."""
    plain = frozenset({"float8_text"}) if originals else frozenset()
    mine = acceleration.choose(server, "cuda", HOPPER, situation, without=plain)
    found = acceleration.offered(mine, situation, originals=originals)
    assert list(found) == offered
    assert found[server] == mine
    for name, one in found.items():
        left_out = set(TIERS[name].options) - set(one.options)
        assert left_out <= {"cuda_graph", *plain}


def test_a_float8_text_encoder_is_for_good() -> None:
    """Its full weights are gone: only tiers that have it are offered."""
    mine = acceleration.choose("fast", "cuda", HOPPER, NOTHING)
    assert list(acceleration.offered(mine, NOTHING, originals=True)) == ["fast", "turbo"]


@pytest.mark.parametrize(("device", "tier"), [("cuda", "exact"), ("cpu", "eager")])
def test_auto_follows_the_device(device: str, tier: str) -> None:
    """Exact pictures on a GPU, diffusers as it is without."""
    assert acceleration.choose("auto", device, HOPPER, NOTHING).tier.name == tier


@pytest.mark.parametrize(
    ("speed", "capability", "situation", "says"),
    [
        ("fast", (8, 0), NOTHING, "float8 needs compute capability 8.9 .*KLEIN_SPEED=exact can"),
        (
            "turbo",
            HOPPER,
            frozenset({"distilled"}),
            "step_skipping .*distilled.*KLEIN_SPEED=fast can",
        ),
        ("exact", HOPPER, frozenset({"sequential"}), "fused .*sequential.*KLEIN_SPEED=eager can"),
        ("fast", HOPPER, frozenset({"model"}), "float8 .*offload.*KLEIN_SPEED=exact can"),
        ("turbo", (8, 0), NOTHING, "float8 .*KLEIN_SPEED=exact_skipping can"),
        ("exact_skipping", (7, 5), NOTHING, "fused needs .*KLEIN_SPEED=eager_skipping can"),
        ("exact", (7, 5), NOTHING, "fused needs compute capability 8.0 .*KLEIN_SPEED=eager can"),
    ],
)
def test_a_tier_that_cannot_be_is_refused_with_the_best_that_can(
    speed: str, capability: tuple[int, int], situation: frozenset[str], says: str
) -> None:
    """Nothing that was asked for is quietly something else."""
    with pytest.raises(ModelUnavailable, match=says) as caught:
        acceleration.choose(speed, "cuda", capability, situation)
    assert caught.value.field == "KLEIN_SPEED"


def test_what_is_optional_is_left_out_where_it_cannot_be() -> None:
    """Model offload costs exact its graph and nothing else."""
    whole = acceleration.choose("exact", "cuda", HOPPER, NOTHING)
    offloaded = acceleration.choose("exact", "cuda", HOPPER, frozenset({"model"}))
    assert offloaded.tier is whole.tier
    assert set(whole.options) - set(offloaded.options) == {"cuda_graph"}
    assert not acceleration.excludes(TIERS["exact"], {"model"})
    assert acceleration.excludes(TIERS["fast"], {"model"})


def test_what_is_optional_can_be_turned_off() -> None:
    """The rest of the tier stands."""
    whole = acceleration.choose("turbo", "cuda", HOPPER, NOTHING)
    without = acceleration.choose("turbo", "cuda", HOPPER, NOTHING, without={"float8_text"})
    assert set(whole.options) - set(without.options) == {"float8_text"}


def test_klein_s_own_choice_gives_way_and_says_why() -> None:
    """Nobody asked for exact, so eager serves, with a sentence for /capabilities."""
    chosen = acceleration.choose("auto", "cuda", (7, 5), NOTHING)
    assert chosen.tier.name == "eager"
    assert "exact cannot be used: fused needs compute capability 8.0" in chosen.why


def test_every_tier_can_be_named() -> None:
    """And what is not a tier is refused with those that are."""
    for name in (*TIERS, "auto"):
        assert Settings.from_env({"KLEIN_SPEED": name}).speed == name
    with pytest.raises(BadSetting, match=f"must be one of auto, {', '.join(TIERS)}"):
        Settings.from_env({"KLEIN_SPEED": "warp"})


def test_step_skipping_computes_the_first_every_other_and_the_last() -> None:
    """A line through two known velocities needs two known velocities."""
    due = [step for step in range(10) if StepSkipping(first=3, every=2).computes(step, 10)]
    assert due == [0, 1, 2, 3, 5, 7, 9]
    assert STEP_SKIPPING.first >= 2
    assert STEP_SKIPPING.computed(28) == 16
    assert [STEP_SKIPPING.computed(steps) for steps in (1, 2, 3, 4)] == [1, 2, 3, 4]
