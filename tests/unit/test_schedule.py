import itertools
import math

import pytest

from klein.models.schedule import SCHEDULES, ai_toolkit_mu, bfl_mu, linear_mu, mu_of, sigmas

# width, height, bfl at 4/20/25/28/50 steps, ai_toolkit, linear: computed from diffusers' and
# ai-toolkit's own functions.
TABLE = [
    (512, 512, (2.0307, 1.9163, 1.8806, 1.8592, 1.7020), 0.6300, 0.6733),
    (768, 1024, (2.2043, 2.1041, 2.0728, 2.0540, 1.9162), 0.9767, 1.0200),
    (1024, 1024, (2.2912, 2.1980, 2.1689, 2.1514, 2.0234), 1.1500, 1.1933),
    (1024, 1536, (1.4967,) * 5, 1.4967, 1.5400),
    (1536, 1536, (2.0167,) * 5, 2.0167, 2.0600),
    (2048, 2048, (3.2300,) * 5, 3.2300, 3.2733),
]


@pytest.mark.parametrize(("width", "height", "bfl", "ai_toolkit", "linear"), TABLE)
def test_mu_table(
    width: int, height: int, bfl: tuple[float, ...], ai_toolkit: float, linear: float
) -> None:
    """Every published value to 4 decimals."""
    tokens = width * height // 256
    for steps, expected in zip((4, 20, 25, 28, 50), bfl, strict=True):
        assert bfl_mu(tokens, steps) == pytest.approx(expected, abs=5e-5)
    assert ai_toolkit_mu(tokens) == pytest.approx(ai_toolkit, abs=5e-5)
    assert linear_mu(tokens) == pytest.approx(linear, abs=5e-5)


def test_the_jump() -> None:
    """Sixteen more pixels cross BFL's limit, and mu falls by almost one."""
    assert bfl_mu(1024 * 1072 // 256, 50) == pytest.approx(2.04, abs=5e-3)
    assert bfl_mu(1024 * 1088 // 256, 50) == pytest.approx(1.19, abs=5e-3)


def test_above_the_limit_bfl_is_ai_toolkit() -> None:
    """Large pictures look like the previews under either schedule."""
    for tokens in (4352, 6144, 16384):
        assert bfl_mu(tokens, 28) == pytest.approx(ai_toolkit_mu(tokens), abs=1e-4)


def test_a_number_is_mu() -> None:
    """Names are looked up, numbers are taken as they are."""
    assert mu_of(1.25, 4096, 28) == 1.25
    for name, (formula, _) in SCHEDULES.items():
        assert mu_of(name, 4096, 28) == formula(4096, 28)


def test_sigmas_fall_from_one() -> None:
    """Known values at 1024×1024 and 25 steps: the last sigma is 0.267 (bfl), 0.116 (ai_toolkit)."""
    for mu, last in ((2.1689, 0.267), (1.15, 0.116)):
        run = sigmas(mu, 25)
        assert run[0] == pytest.approx(1.0)
        assert all(a > b for a, b in itertools.pairwise(run))
        assert run[-1] == pytest.approx(last, abs=1e-3)


def test_mu_zero_is_no_shift() -> None:
    """e^0 = 1 leaves the uniform grid as it is."""
    assert sigmas(0.0, 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert math.isclose(sigmas(math.log(3), 2)[1], 0.75)
