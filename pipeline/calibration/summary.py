"""The short table at the end of calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from kvsmith.pipeline.calibration.record import Record, layer_file
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.stage import read_json
from kvsmith.spec import CodecSpec


def report(record: Record, codecs: Mapping[str, CodecSpec], folder: Path, log: Run) -> None:
    """A table of normalised errors, the perplexity, and where everything is."""
    rows: list[list[str]] = []
    sums: dict[str, float] = {}
    owners = record.source.base_model.geometry.owners
    for layer in owners:
        row = [str(layer)]
        for name in codecs:
            errors = read_json(folder / "parameters" / name / f"{layer_file(layer)}.json")
            for key in ("k_rmse", "v_rmse"):
                error = math.nan if errors[key] is None else errors[key]
                row.append(_cell(error))
                sums[f"{name}/{key}"] = sums.get(f"{name}/{key}", 0.0) + error / len(owners)
        rows.append(row)
    if codecs:
        rows.append(["mean", *(_cell(value) for value in sums.values())])
        columns = ["layer", *(f"{n} {x}" for n in codecs for x in "kv")]
        log.table(
            "error of elements within the range, in half widths of it (rms)",
            columns,
            rows,
            "errors",
        )
        log.scalars(0, {n: v for n, v in sums.items() if not math.isnan(v)})
    tokens = record.source.samples * record.source.length
    log.say(f"{tokens:,} tokens of {record.source.dataset}: perplexity {math.exp(record.loss):.2f}")
    log.say(f"calibration in {folder}")


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
