"""Checks and measurements of the kernels.

    python -m kvsmith.kernels.bench --aot [--quick] [--out FILE]

`--aot` compiles every kernel and configuration for every target, without a GPU, prints registers,
spills and shared memory, and exits with 1 where a kernel spills or does not fit; `--quick` a
covering quarter of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kvsmith.kernels import aot


def run_aot(quick: bool, out: Path | None) -> int:
    """Compile, print and write the table; 1 where something is wrong, else 0."""
    # Functions decorated for the interpreter cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    variants = aot.all_variants()
    pairs = aot.cover(variants) if quick else [(v, t) for v in variants for t in aot.TARGETS]
    rows = list(aot.compile_all(pairs))
    sys.stdout.write(aot.table(rows) + "\n")
    faults = [r for r in rows if r.fault]
    sys.stdout.write(f"{len(rows)} kernels compiled, {len(faults)} at fault\n")
    if out is not None:
        out.write_text(json.dumps([asdict(r) | {"fault": r.fault} for r in rows], indent=1) + "\n")
    return 1 if faults or not rows else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m kvsmith.kernels.bench")
    parser.add_argument("--aot", action="store_true", help="compile for all targets, no GPU needed")
    parser.add_argument("--quick", action="store_true", help="a covering part")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args(arguments)
    if not options.aot:
        parser.error("give --aot")
    return run_aot(options.quick, options.out)


if __name__ == "__main__":
    sys.exit(main())
