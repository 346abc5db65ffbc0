"""`make fuzz`: a million damaged bundles; `python -m tests.fuzz --help` for others."""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.fuzz.campaign import Failure, Tally, run

STEP = 2000
MEMORY = 256 * 2**20  # growth of the peak, bytes


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    seed, end = options.seed, options.first + options.count
    say(f"seed {seed}, numbers {options.first} to {end - 1}")
    tally, began = Tally(), time.monotonic()
    for first in range(options.first, end, STEP):
        numbers = range(first, min(first + STEP, end))
        with tempfile.TemporaryDirectory() as folder:
            try:
                run(Path(folder), seed, numbers, tally)
            except Failure as failure:
                say(f"FAILED {failure}")
                return 1
            except KeyboardInterrupt:
                say(f"stopped; go on with: make fuzz SEED={seed} FIRST={first}")
                return 130
        if tally.memory > MEMORY:
            say(f"FAILED seed {seed}, numbers {numbers}: peak grew by {tally.memory >> 20} MiB")
            return 1
        progress(tally, end - options.first, time.monotonic() - began, numbers.stop)
    summary(tally)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000, help="cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument(
        "--seed", type=int, default=secrets.randbelow(2**32), help="random if absent"
    )
    return parser.parse_args()


def progress(tally: Tally, count: int, seconds: float, reached: int) -> None:
    tried, refused = tally.tried.total(), tally.refused.total()
    say(
        f"{tried:>9,} of {count:,}  refused {refused:,}  {tried / seconds:,.0f} a second  "
        f"slowest {tally.slowest[0]:.2f} s  peak +{tally.memory >> 20} MiB  next {reached}"
    )


def summary(tally: Tally) -> None:
    for name in sorted(tally.tried):
        say(f"{name:32} {tally.tried[name]:>9,} tried {tally.refused[name]:>9,} refused")
    say(f"{len(tally.reasons)} reasons, {tally.seconds:.0f} s of CPU time, nothing wrong")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
