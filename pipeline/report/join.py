"""report.py: the results of several evaluations as one table, CSV, JSON and figure.

`python evaluate.py -m codec=nuq4_o1,nuq3_o1` leaves one folder a run; `python report.py FOLDER`
finds every results.json below it. Runs are compared where they measured the same model on the same
text in the same way; what was measured in several of them, such as full precision, is named once.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsmith.errors import explain
from kvsmith.pipeline.config import main_guard
from kvsmith.pipeline.evaluation.find import shown
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.metrics import write_csv
from kvsmith.pipeline.report import table
from kvsmith.pipeline.report.page import page, section
from kvsmith.pipeline.report.table import Row
from kvsmith.pipeline.stage import atomic_write, read_json, write_json

RESULTS = "results.json"
COMMON = ("model", "data", "measure")  # of a run's configuration: what makes figures comparable


@dataclass(frozen=True)
class Comparison:
    """Runs that measured the same model on the same text in the same way.

    Attributes:
        title: what was measured.
        protocol: how, in sentences.
        runs: their folders.
        facts: commit and versions of each run, a sentence each.
        images: figures of the runs.
        rows: everything measured, by all-in bits, the largest first.
    """

    title: str
    protocol: tuple[str, ...]
    runs: tuple[str, ...]
    rows: tuple[Row, ...]
    facts: tuple[str, ...] = ()
    images: tuple[Path, ...] = ()


def join(folders: Sequence[Path]) -> list[Comparison]:
    """Read all results below `folders`.

    Args:
        folders: of runs, or of sweeps.

    Returns:
        One comparison for each model, text and way of measuring, in the order they were found.

    Raises:
        FileNotFoundError: a folder holds no results.
        ValueError, TypeError: a file is damaged.
    """
    groups: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for path in (path for folder in folders for path in _results(folder)):
        data = read_json(path)
        if not isinstance(data, dict) or not {"config", "protocol", "rows", "title"} <= data.keys():
            expected = "what evaluate.py writes"
            raise ValueError(explain(str(path), "file", expected, "something else"))
        key = repr([data["config"].get(name) for name in COMMON] + [data["protocol"]])
        groups.setdefault(key, []).append((path, data))
    return [_comparison(runs) for runs in groups.values()]


def _results(folder: Path) -> list[Path]:
    found = sorted(folder.rglob(RESULTS))
    if not found:
        remedy = "Give the folder of a run or a sweep of evaluate.py."
        expected = f"one with {RESULTS} in it"
        raise FileNotFoundError(explain(str(folder), "folder", expected, "none", remedy))
    return found


def _comparison(runs: Sequence[tuple[Path, dict[str, Any]]]) -> Comparison:
    rows: dict[str, Row] = {}
    for path, data in runs:
        for i, plain in enumerate(data["rows"]):
            row = table.read(plain, f"{path}: rows[{i}]")
            name = row.name
            if name in rows and not _same(rows[name], row):
                name = f"{name} ({path.parent.name})"
            rows.setdefault(name, table.renamed(row, name))
    ordered = sorted(rows.values(), key=lambda row: (-row.bits, row.name))
    first = runs[0][1]
    places = tuple(shown(path.parent) for path, _ in runs)
    facts = [
        f"{place}: commit {data.get('commit')}, "
        + ", ".join(f"{name} {version}" for name, version in data.get("versions", {}).items())
        for place, (_, data) in zip(places, runs, strict=True)
    ]
    images = [path for folder, _ in runs for path in sorted(folder.parent.glob("codebooks*.png"))]
    found = (tuple(ordered), tuple(facts), tuple(images))
    return Comparison(first["title"], tuple(first["protocol"]), places, *found)


def _same(a: Row, b: Row) -> bool:
    """Whether two rows measured the same cache: all but the time is equal."""
    return a.candidate.spec == b.candidate.spec and a.found.fidelity == b.found.fidelity


def write(comparisons: Sequence[Comparison], folder: Path, log: Run) -> list[str]:
    """Show the tables, and write them with a figure each.

    Args:
        comparisons: from `join`.
        folder: where joined.csv, .json, .md, .html (the whole on one page) and .png go.
        log: shows the tables.

    Returns:
        Names of the files.
    """
    columns = ["title", *table.flat(comparisons[0].rows[0])]
    cells = [[c.title, *table.flat(row).values()] for c in comparisons for row in c.rows]
    write_csv(folder / "joined.csv", columns, cells)
    facts = [
        {
            "title": c.title,
            "protocol": list(c.protocol),
            "runs": list(c.runs),
            "rows": [table.plain(row) for row in c.rows],
        }
        for c in comparisons
    ]
    write_json(folder / "joined.json", {"comparisons": facts})
    pages = [table.markdown(c.title, c.protocol, c.rows) for c in comparisons]
    atomic_write(folder / "joined.md", "\n".join(pages).encode())
    parts = (section(c.title, c.protocol, c.rows, c.facts, c.images) for c in comparisons)
    atomic_write(folder / "joined.html", page(comparisons[0].title, parts).encode())
    for c in comparisons:
        log.table(c.title, table.COLUMNS, [table.cells(row) for row in c.rows])
        for line in (*c.protocol, *table.comparisons(c.rows)):
            log.say(line)
    return ["joined.csv", "joined.json", "joined.md", "joined.html", *_figures(comparisons, folder)]


def _figures(comparisons: Sequence[Comparison], folder: Path) -> list[str]:
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from kvsmith.pipeline.report.plots import plot_losses

    names = []
    for i, c in enumerate(comparisons):
        if any(row.candidate.role != "full" for row in c.rows):
            names.append("joined.png" if len(comparisons) == 1 else f"joined-{i}.png")
            plot_losses(c.rows, folder / names[-1], c.title)
    return names


def main(arguments: Sequence[str]) -> int:
    """The command line of report.py; the exit code."""
    parser = argparse.ArgumentParser(prog="report.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="of runs or sweeps of evaluate.py")
    parser.add_argument("--to", type=Path, help="where files go; the first folder")
    given = parser.parse_args(arguments)

    def run() -> None:
        to = given.to or given.folders[0]
        with Run(None) as log:
            names = write(join(given.folders), to, log)
            log.say(f"written to {shown(to)}: {', '.join(names)}")

    return main_guard(run)
