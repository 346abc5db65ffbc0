"""What GEAR's parts take from the error, what they cost in bytes and time, and where they pay.

    python -m kvsmith.pipeline.gear.bench parts|frontier|pays|encode|decode|generate|breakdown

One thread. Times are the process's own (CPU seconds), and candidates take turns, so that a busy
machine troubles all alike.
"""

from __future__ import annotations

import argparse
import os

# Before torch loads: its thread pool reads it once.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from kvsmith.pipeline.gear import error, frontier, generation, times
from kvsmith.pipeline.log import Run

TASKS = {
    "parts": error.parts,
    "frontier": frontier.frontier,
    "pays": frontier.pays,
    "encode": times.encode,
    "decode": times.decode,
    "generate": generation.generate,
    "breakdown": generation.breakdown,
}


@torch.inference_mode()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    task = TASKS[parser.parse_args().task]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with Run(None) as log:
        task(log)


if __name__ == "__main__":
    main()
