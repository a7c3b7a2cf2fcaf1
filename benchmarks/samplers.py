"""How near each sampler comes to the true path: distance to a 240-step Euler run, on nano.

    python -m benchmarks.samplers                     # a Markdown table; minutes
    python -m benchmarks.samplers --prompts 2 --steps 16 28 --write table.md

Every run has the noise levels of the same mu, that of 28 steps. *With step skipping* some steps are
extrapolated: the second number is how many are computed.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.nano import Nano, distance, run
from klein.models.samplers import SAMPLERS
from klein.models.speed import STEP_SKIPPING

CONVERGED = 240
STEPS = (8, 10, 12, 16, 20, 24, 28, 50)


def table(nano: Nano, steps: Sequence[int]) -> Iterator[str]:
    """The lines of a Markdown table: a row a number of steps, mean differences of 255."""
    converged = nano.draw(run(CONVERGED))
    names = list(SAMPLERS)
    skipped = [f"{name}, step skipping" for name in names]
    yield f"| steps | {' | '.join(names + skipped)} |"
    yield "|---" * (1 + 2 * len(names)) + "|"
    for count in steps:
        whole = [distance(nano.draw(run(count, name)), converged) for name in names]
        row = [f"{gap:.2f}" for gap in whole]
        for name in names:
            some = run(count, name, skipping=STEP_SKIPPING)
            row.append(f"{distance(nano.draw(some), converged):.2f} ({some.computed} computed)")
        yield f"| {count} | {' | '.join(row)} |"


def main() -> None:
    """Print the table, and write it to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    lines = []
    for line in table(Nano(args.prompts), args.steps):
        print(line, flush=True)
        lines.append(line)
    if args.write:
        args.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
