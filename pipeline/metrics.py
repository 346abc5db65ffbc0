"""Numbers of a run as files: scalars by step, and tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvsmith.pipeline.stage import atomic_write

JSONL, CSV = "metrics.jsonl", "metrics.csv"


class Metrics:
    """`metrics.jsonl` (one object a step) and `metrics.csv` (step, name, value) in a folder.

    They are appended to, so that a resumed run continues them.

    Args:
        folder: of the run; made if absent.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of a step."""
        with (self._folder / JSONL).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        path = self._folder / CSV
        new = not path.exists()
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(["step", "name", "value"])
            writer.writerows([step, name, repr(value)] for name, value in values.items())

    def rewind(self, step: int) -> None:
        """Forget values after `step`."""
        path = self._folder / JSONL
        if path.is_file():
            lines = path.read_text("utf-8").splitlines()
            # a killed run may have left half a line
            whole = [line for line in lines if line.endswith("}")]
            kept = [line for line in whole if json.loads(line)["step"] <= step]
            atomic_write(path, "".join(f"{line}\n" for line in kept).encode())
        path = self._folder / CSV
        if path.is_file():
            head, *rows = path.read_text("utf-8").splitlines()
            kept = [row for row in rows if row.count(",") == 2 and int(row.split(",")[0]) <= step]
            atomic_write(path, "".join(f"{row}\n" for row in (head, *kept)).encode())

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Write a table as `<name>.csv`."""
        write_csv(self._folder / f"{name}.csv", columns, rows)


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table, whole; None is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns, *rows])
    atomic_write(path, text.getvalue().encode())
