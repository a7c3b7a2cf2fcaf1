"""Two processes draw on the same cores, with threads that sleep while they wait and that spin.

    python -m benchmarks.under_load               # seconds an image of 8 steps, nano at 256×256

The rounds alternate, for whatever else runs on the machine; each figure is one process in a round.
klein sets OMP_WAIT_POLICY=PASSIVE before torch is loaded; *unset* is torch without it.
"""

import argparse
import os
import subprocess
import sys
import time

from benchmarks.nano import Nano, run

STEPS = 8
PROCESSES = 2


def worker(images: int) -> float:
    """Seconds an image, after one that is not counted."""
    nano, one = Nano(1), run(STEPS)
    nano.draw(one)
    started = time.perf_counter()
    for _ in range(images):
        nano.draw(one)
    return (time.perf_counter() - started) / images


def side_by_side(policy: str | None, images: int) -> list[float]:
    """What each of PROCESSES workers says, with that OMP_WAIT_POLICY."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    if policy:
        env["OMP_WAIT_POLICY"] = policy
    argv = [sys.executable, "-m", "benchmarks.under_load", "--worker", "--images", str(images)]
    running = [
        subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)
    ]
    return [float(process.communicate()[0]) for process in running]


def main() -> None:
    """Print a line for each policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--worker", action="store_true", help="draw in this process")
    args = parser.parse_args()
    if args.worker:
        print(worker(args.images))
        return
    for policy in ("PASSIVE", None) * args.rounds:
        seconds = ", ".join(f"{each:.2f}" for each in side_by_side(policy, args.images))
        print(f"{policy or 'unset':<8} {seconds}", flush=True)


if __name__ == "__main__":
    main()
