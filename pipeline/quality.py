"""Measured numbers for a bundle's manifest and card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvsmith.errors import explain
from kvsmith.pipeline.stage import read_json


def read_quality(path: Path, name: str) -> dict[str, float]:
    """Measured numbers from a JSON file.

    Args:
        path: an object of numbers, or what evaluate.py wrote: then the bundle's own row is taken.
        name: folder of the bundle.

    Returns:
        Dotted name -> number.

    Raises:
        FileNotFoundError, ValueError: no such file, no row of this bundle, or not numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(explain("quality", "value", "an existing file", repr(str(path))))
    data = read_json(path)
    rows = data.get("rows") if isinstance(data, dict) else None
    if isinstance(rows, list):
        own = [row for row in rows if Path(row.get("source") or "").name == name]
        if not own:
            remedy = f"Run `python evaluate.py bundle=<folder of {name}>`."
            raise ValueError(explain(str(path), "rows", f"one of {name}", "none", remedy))
        described = ("name", "role", "source", "cache")
        data = {key: value for key, value in own[0].items() if key not in described}
    quality = _numbers(data)
    if not quality:
        raise ValueError(explain(str(path), "content", "numbers by name", "none"))
    return quality


def _numbers(data: Any, prefix: str = "") -> dict[str, float]:
    """Every number of nested mappings, by its dotted name."""
    if isinstance(data, dict):
        parts = [_numbers(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in data.items()]
        return {name: value for part in parts for name, value in part.items()}
    return {prefix: float(data)} if type(data) in (int, float) and prefix else {}
