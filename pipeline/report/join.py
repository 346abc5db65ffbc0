"""report.py: the results of several evaluations as one table, CSV, JSON, figure and page.

`python evaluate.py -m codec=nuq4_o1,nuq3_o1` leaves one folder a run; `python report.py FOLDER`
finds every results.json below it. Runs are compared where they measured the same model on the same
text in the same way; what was measured in several of them, such as full precision, is named once.
Runs that differ in the seed alone also get a table of their spread. What calibrate.py left of a
budget goes onto the page, too.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from kvsmith.errors import explain
from kvsmith.geometry import ModelGeometry
from kvsmith.pipeline.config import main_guard
from kvsmith.pipeline.evaluation.find import shown
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.metrics import write_csv
from kvsmith.pipeline.report import table
from kvsmith.pipeline.report.page import budget_section, page, section, table_of
from kvsmith.pipeline.report.provenance import told
from kvsmith.pipeline.report.table import Row
from kvsmith.pipeline.stage import atomic_write, read_json, write_json
from kvsmith.strict import from_dict

RESULTS, BUDGET = "results.json", "budget.json"
Table = tuple[str, tuple[str, ...], list[list[str]]]
SPREAD = (
    *("cache", "bits at 32K", "seeds", "ppl %", "+-", "KLD", "+-", "length", "+-"),
    *("drift", "+-", "recall", "+-", "together", "+-"),
)
SPREAD_KEYS = (
    ("perplexity_change", 100, "+.2f"),
    ("kld", 1, ".2e"),
    ("greedy_length", 1, ".0f"),
    ("drift_kld", 1, ".2e"),
    ("recall_gain", 1, ".2f"),
    ("together_gain", 1, ".2f"),
)
BUDGET_KEYS = {
    "model",
    "levels",
    "layers",
    "sides",
    "loss",
    "context",
    "chosen",
    "curve",
    "uniform",
}
COMMON = ("model", "data", "measure")  # of a run's configuration: what makes figures comparable


@dataclass(frozen=True)
class Comparison:
    """Runs that measured the same model on the same text in the same way.

    Attributes:
        title: what was measured.
        protocol: how, in sentences.
        runs: their folders.
        rows: everything measured, by all-in bits, the largest first.
        seed: of the windows.
        but_seed: what is equal in runs that differ in the seed alone.
        facts: command, commit, hardware and versions of each run, a sentence each.
        images: figures of the runs.
        shape: the model's; None where the runs do not say.
        weights: bytes of its parameters.
    """

    title: str
    protocol: tuple[str, ...]
    runs: tuple[str, ...]
    rows: tuple[Row, ...]
    seed: int
    but_seed: str
    facts: tuple[str, ...]
    images: tuple[Path, ...]
    shape: ModelGeometry | None
    weights: int


def join(folders: Sequence[Path]) -> list[Comparison]:
    """Read all results below `folders`.

    Args:
        folders: of runs, or of sweeps.

    Returns:
        One comparison for each model, text and way of measuring, in the order they were found.

    Raises:
        ValueError, TypeError: a file is damaged.
    """
    groups: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for path in (path for folder in folders for path in sorted(folder.rglob(RESULTS))):
        data = read_json(path)
        if not isinstance(data, dict) or not {"config", "protocol", "rows", "title"} <= data.keys():
            expected = "what evaluate.py writes"
            raise ValueError(explain(str(path), "file", expected, "something else"))
        key = repr([data["config"].get(name) for name in COMMON] + [data["protocol"]])
        groups.setdefault(key, []).append((path, data))
    return [_comparison(runs) for runs in groups.values()]


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
    facts = [f"{p}: {line}" for p, (_, d) in zip(places, runs, strict=True) for line in told(d)]
    images = [path for folder, _ in runs for path in sorted(folder.parent.glob("codebooks*.png"))]
    measure = first["config"].get("measure") or {}
    parts = [first["config"].get(name) for name in COMMON[:2]]
    shape = first.get("geometry")
    return Comparison(
        title=first["title"],
        protocol=tuple(first["protocol"]),
        runs=places,
        rows=tuple(ordered),
        seed=int(first.get("seed", 0)),
        but_seed=repr([*parts, {k: v for k, v in measure.items() if k != "seed"}]),
        facts=tuple(facts),
        images=tuple(images),
        shape=None if shape is None else from_dict(ModelGeometry, shape, "geometry"),
        weights=int(first.get("weights", 0)),
    )


def _same(a: Row, b: Row) -> bool:
    """Whether two rows measured the same cache: all but the time is equal."""
    return a.candidate.spec == b.candidate.spec and a.found.fidelity == b.found.fidelity


def over_seeds(comparisons: Sequence[Comparison]) -> list[Table]:
    """Mean and standard deviation over runs that differ in the seed alone; a table each."""
    groups: dict[str, list[Comparison]] = {}
    for c in comparisons:
        groups.setdefault(c.but_seed, []).append(c)
    found: list[Table] = []
    for group in groups.values():
        if len(group) > 1:
            seeds = ", ".join(str(c.seed) for c in group)
            title = f"{group[0].title}: mean +- standard deviation over seeds {seeds}"
            found.append((title, SPREAD, _spread_cells(group)))
    return found


def _spread_cells(group: Sequence[Comparison]) -> list[list[str]]:
    lines = []
    for row in group[0].rows:
        same = [r for c in group for r in c.rows if r.name == row.name]
        if len(same) < len(group):
            continue
        found = [table.flat(r) for r in same]
        cells = [row.name, f"{row.found.long_bits:.2f}", str(len(same))]
        for key, scale, digits in SPREAD_KEYS:
            values = [scale * float(str(f[key])) for f in found]
            cells += [f"{mean(values):{digits}}", f"{stdev(values):{digits}}"]
        lines.append(cells)
    return lines


def read_budgets(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """What runs of calibrate.py left of their budgets, below `folders`.

    Raises:
        ValueError: a file is something else.
    """
    found = []
    for path in (path for folder in folders for path in sorted(folder.rglob(BUDGET))):
        data = read_json(path)
        if not isinstance(data, dict) or not BUDGET_KEYS <= data.keys():
            raise ValueError(explain(str(path), "file", "what calibrate.py writes", "another"))
        found.append(data)
    return found


def write_page(
    comparisons: Sequence[Comparison],
    spreads: Sequence[Table],
    budgets: Sequence[dict[str, Any]],
    folder: Path,
) -> None:
    """Write joined.html; arguments as of `write`."""
    parts = [
        section(c.title, c.protocol, c.rows, c.facts, c.images, c.shape, c.weights)
        for c in comparisons
    ]
    parts += [table_of(*spread) for spread in spreads]
    parts += [budget_section(data, told(data)) for data in budgets]
    title = comparisons[0].title if comparisons else f"{budgets[0]['model']}: budgets"
    atomic_write(folder / "joined.html", page(title, parts).encode())


def write(
    comparisons: Sequence[Comparison],
    budgets: Sequence[dict[str, Any]],
    folder: Path,
    log: Run,
    long: bool = False,
) -> list[str]:
    """Show the tables, and write them with a figure each.

    Args:
        comparisons: from `join`.
        budgets: from `read_budgets`.
        folder: where joined.csv, .json, .md, .html (the whole on one page) and .png go.
        log: shows the tables.
        long: whether the figure's bits are those at 32,768 tokens.

    Returns:
        Names of the files.
    """
    if not comparisons:
        write_page([], [], budgets, folder)
        return ["joined.html"]
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
    spreads = over_seeds(comparisons)
    for spread in spreads:
        log.table(*spread)
    write_page(comparisons, spreads, budgets, folder)
    for c in comparisons:
        log.say(c.title)
        for part in table.tables(c.rows):
            log.table(*part)
        for line in (*c.protocol, *table.comparisons(c.rows), *table.answered(c.rows)):
            log.say(line)
    return [
        "joined.csv",
        "joined.json",
        "joined.md",
        "joined.html",
        *_figures(comparisons, folder, long),
    ]


def _figures(comparisons: Sequence[Comparison], folder: Path, long: bool) -> list[str]:
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from kvsmith.pipeline.report.plots import plot_losses

    names = []
    for i, c in enumerate(comparisons):
        if any(row.candidate.role != "full" for row in c.rows):
            names.append("joined.png" if len(comparisons) == 1 else f"joined-{i}.png")
            plot_losses(c.rows, folder / names[-1], c.title, long)
    return names


def _check_folder(folder: Path) -> None:
    if not any(next(folder.rglob(name), None) for name in (RESULTS, BUDGET)):
        remedy = "Give the folder of a run or a sweep of evaluate.py, or of a budget."
        expected = f"one with {RESULTS} or {BUDGET} in it"
        raise FileNotFoundError(explain(str(folder), "folder", expected, "none", remedy))


def main(arguments: Sequence[str]) -> int:
    """The command line of report.py; the exit code."""
    parser = argparse.ArgumentParser(prog="report.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="of runs or sweeps of evaluate.py")
    parser.add_argument("--to", type=Path, help="where files go; the first folder")
    parser.add_argument("--long", action="store_true", help="the figure's bits at 32,768 tokens")
    given = parser.parse_args(arguments)

    def run() -> None:
        to = given.to or given.folders[0]
        with Run(None) as log:
            found, budgets = join(given.folders), read_budgets(given.folders)
            for folder in given.folders:
                _check_folder(folder)
            names = write(found, budgets, to, log, given.long)
            log.say(f"written to {shown(to)}: {', '.join(names)}")

    return main_guard(run)
