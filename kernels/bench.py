"""Checks and measurements of the kernels.

    python -m kvsmith.kernels.bench [--quick] [--out FILE]
    python -m kvsmith.kernels.bench --end-to-end | --fill [--out FILE]
    python -m kvsmith.kernels.bench --aot [--quick] [--out FILE]

Without these, times attend_encoded, encode_pack and column_scores on the GPU: an op whose result
differs from its reference is not timed. Prints and writes, for each op and shape, the 20th, 50th
and 80th percentile of the time, the bytes a second, their share of a measured copy, and how many
times faster than the best of torch's attention on a dense bfloat16 cache. `$OUT` is where the JSON
goes without `--out`. `--quick` is one model at batch 1. Without a GPU: one line, and exit code 2.

`--end-to-end` decodes after 128K tokens on the shape of Llama-3-8B with random weights, against
DynamicCache; `--fill` stores as many tokens at 2 bits as fit, decodes one and records the peak.

`--aot` compiles every kernel and configuration for every target, without a GPU, prints registers,
spills and shared memory, and exits with 1 where a kernel spills or does not fit; `--quick` a
few that cover every kernel and target.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kvsmith.kernels import aot
from kvsmith.kernels.bench_attend import attend_rows, check_attend
from kvsmith.kernels.bench_ops import (
    Shape,
    check_column_scores,
    check_encode_pack,
    column_rows,
    encode_rows,
    shapes,
)
from kvsmith.kernels.bench_time import copy_bandwidth, environment

MINUTES = {False: 8.0, True: 1.5}
COPY_BYTES = 1 << 30
FILLED = 0.95  # of the free memory; the rest is for one step
# By op: what differs from the reference, and the rows of a shape.
CHECKS = {
    "attend_encoded": check_attend,
    "encode_pack": check_encode_pack,
    "column_scores": check_column_scores,
}
ROWS = {"attend_encoded": attend_rows, "encode_pack": encode_rows, "column_scores": column_rows}
NO_GPU = "kvsmith.kernels.bench: a GPU is needed; --aot runs without one\n"


def run_aot(quick: bool, out: Path | None) -> int:
    """Compile, print and write the table; 1 where something is wrong, else 0."""
    # Functions decorated for the interpreter cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    variants = aot.all_variants()
    pairs = (
        aot.cover(variants)
        if quick
        else [(v, t) for v in variants for t in aot.TARGETS if v.runs_on(t)]
    )
    rows = list(aot.compile_all(pairs))
    sys.stdout.write(aot.table(rows) + "\n")
    faults = [r for r in rows if r.fault]
    sys.stdout.write(f"{len(rows)} kernels compiled, {len(faults)} at fault\n")
    if out is not None:
        out.write_text(json.dumps([asdict(r) | {"fault": r.fault} for r in rows], indent=1) + "\n")
    return 1 if faults or not rows else 0


def run_ops(
    wanted: Sequence[Shape], device: torch.device, seconds: float, end: float, bandwidth: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of every op that is right, and what was left out and why.

    Args:
        wanted: shapes.
        device: where.
        seconds: how long to sample each row.
        end: `time.monotonic()` after which no further shape is begun.
        bandwidth: bytes a second of a copy.
    """
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for op, check in CHECKS.items():
        if fault := check(device):
            left_out.append(f"{op} is not timed: {fault}")
            continue
        for shape in wanted:
            if time.monotonic() > end:
                left_out.append(f"{op} {shape}: no time left")
                continue
            try:
                for row in ROWS[op](shape, device, seconds):
                    rows.append(finished(row, shape, bandwidth))
            except torch.OutOfMemoryError:
                left_out.append(f"{op} {shape}: does not fit")
    return rows, left_out


def finished(row: dict[str, Any], shape: Shape, bandwidth: float) -> dict[str, Any]:
    """A row with its shape, bytes a second and share of a copy."""
    rate = row["bytes"] / row["time"].p50
    fields = {"shape": asdict(shape), "time": asdict(row["time"])}
    return row | fields | {"gb_per_s": rate / 1e9, "share_of_copy": rate / bandwidth}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'op':16}{'shape':26}{'bits':>5}{'p20 us':>10}{'p50 us':>10}{'p80 us':>10}"]
    lines[0] += f"{'GB/s':>9}{'of copy':>9}{'x dense':>9}"
    for row in rows:
        times = "".join(f"{row['time'][p] * 1e6:10.1f}" for p in ("p20", "p50", "p80"))
        line = f"{row['op']:16}{str(Shape(**row['shape'])):26}{row['bits']:5}{times}"
        line += f"{row['gb_per_s']:9.1f}{row['share_of_copy']:9.1%}"
        lines.append(line + (f"{row['speedup']:9.2f}" if "speedup" in row else ""))
    return "\n".join(lines)


def run_gpu(quick: bool, out: Path | None) -> int:
    """Time everything on the GPU; 2 without one, 1 where an op is wrong, else 0."""
    if not torch.cuda.is_available():
        sys.stderr.write(NO_GPU)
        return 2
    device = torch.device("cuda")
    end = time.monotonic() + 60 * MINUTES[quick]
    memory = torch.cuda.get_device_properties(device).total_memory
    bandwidth = copy_bandwidth(device, COPY_BYTES, 0.5)
    rows, left_out = run_ops(list(shapes(quick, memory)), device, 0.1, end, bandwidth)
    sys.stdout.write(table(rows) + "\n" + "".join(f"{line}\n" for line in left_out))
    report = {"environment": environment(device), "copy_gb_per_s": bandwidth / 1e9}
    report |= {"rows": rows, "left_out": left_out}
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if any("is not timed" in line for line in left_out) else 0


def run_model(filling: bool, out: Path | None) -> int:
    """Run the whole model on the GPU; 2 without one."""
    if not torch.cuda.is_available():
        sys.stderr.write(NO_GPU)
        return 2
    from kvsmith.kernels import bench_model

    device = torch.device("cuda")
    model = bench_model.random_model(bench_model.LLAMA_3_8B, device, torch.bfloat16)
    if filling:
        free = torch.cuda.mem_get_info()[0]
        rows = [bench_model.fill(model, int(free * FILLED))]
    else:
        rows = bench_model.end_to_end(model, 128 << 10, 64)
    sys.stdout.write("".join(json.dumps(row) + "\n" for row in rows))
    if out is not None:
        report = {"environment": environment(device), "rows": rows}
        out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m kvsmith.kernels.bench")
    parser.add_argument("--aot", action="store_true", help="compile for all targets, no GPU needed")
    parser.add_argument("--end-to-end", action="store_true", help="a whole model at 128K tokens")
    parser.add_argument("--fill", action="store_true", help="as many tokens as fit at 2 bits")
    parser.add_argument("--quick", action="store_true", help="a part, in under two minutes")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args(arguments)
    out = options.out
    if out is None and "OUT" in os.environ:
        out = Path(os.environ["OUT"]) / "bench.json"
    if options.fill or options.end_to_end:
        return run_model(options.fill, out)
    return run_aot(options.quick, out) if options.aot else run_gpu(options.quick, out)


if __name__ == "__main__":
    sys.exit(main())
