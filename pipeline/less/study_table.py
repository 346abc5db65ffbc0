"""The results of a study of states: one file a cell, and the table of their means over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from kvsmith.pipeline.evaluation.candidate import FULL
from kvsmith.pipeline.evaluation.fidelity import paired
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.metrics import write_csv
from kvsmith.pipeline.stage import read_json, write_json
from kvsmith.strict import from_dict

ALONE = "eviction alone"


@dataclass(frozen=True)
class Cell:
    """One policy and budget.

    Attributes:
        policy: of conf/eviction.
        percent: budget, of the model's context.
    """

    policy: str
    percent: int

    @property
    def file(self) -> str:
        """Name of its results."""
        return f"cell_{self.policy}_pct{self.percent}.json"


@dataclass(frozen=True)
class Found:
    """What was measured of one cache.

    Attributes:
        nll: loss of each window, nats a token.
        kld: divergence from full precision, nats a token.
        bytes: of one row's cache at the end, without features and positions; None for full.
        seconds: of training, processor time; None where it was done before.
    """

    nll: tuple[float, ...]
    kld: float
    bytes: int | None
    seconds: float | None


@dataclass(frozen=True)
class Result:
    """All caches of a cell, by name and seed; a cache without training has the seed ''."""

    cell: Cell
    found: dict[str, dict[str, Found]]


@dataclass(frozen=True)
class Line:
    """One cache at one policy and budget, over seeds.

    Attributes:
        policy, percent, cache: which.
        seeds: how many.
        perplexity: exp of the mean loss.
        kld: divergence from full precision, nats a token.
        recovered: share of the loss under eviction, mean over seeds.
        windows_se: its standard error over windows, paired.
        seeds_sd: its standard deviation over seeds.
        each: of every seed.
        bytes: see `Found`.
        seconds: of training, the longest.
    """

    policy: str
    percent: int
    cache: str
    seeds: int
    perplexity: float
    kld: float
    recovered: float
    windows_se: float
    seeds_sd: float | None
    each: tuple[float, ...]
    bytes: int | None
    seconds: float | None


def read_result(path: Path) -> Result:
    """What was measured of a cell so far."""
    return from_dict(Result, read_json(path), str(path))


def read_results(folder: Path) -> list[Result]:
    """Every finished cell."""
    return [read_result(path) for path in sorted(folder.glob("cell_*.json"))]


def lines(results: Iterable[Result]) -> Iterator[Line]:
    """Means over seeds."""
    for result in sorted(results, key=lambda r: (r.cell.policy, r.cell.percent)):
        (full,), (alone,) = (result.found[name].values() for name in (FULL.name, ALONE))
        for name, by_seed in result.found.items():
            rows = list(by_seed.values())
            gap = paired(alone.nll, full.nll)
            gains = [paired(alone.nll, row.nll) for row in rows]
            each = tuple(gain.mean / gap.mean for gain in gains)
            yield Line(
                result.cell.policy,
                result.cell.percent,
                name,
                len(rows),
                math.exp(statistics.mean(_loss(row) for row in rows)),
                statistics.mean(row.kld for row in rows),
                statistics.mean(each),
                statistics.mean((gain.se or 0.0) / gap.mean for gain in gains),
                statistics.stdev(each) if len(each) > 1 else None,
                each,
                rows[0].bytes,
                max((r.seconds for r in rows if r.seconds is not None), default=None),
            )


def _loss(found: Found) -> float:
    return statistics.mean(found.nll)


def write_table(folder: Path, results: list[Result], log: Run) -> None:
    """Show the table, and write it as `table.csv` and `table.json`."""
    made = list(lines(results))
    columns = [f.name for f in fields(Line)]
    flat = [[getattr(line, name) for name in columns] for line in made]
    rows = [[" ".join(map(str, x)) if isinstance(x, tuple) else x for x in row] for row in flat]
    write_csv(folder / "table.csv", columns, rows)
    write_json(folder / "table.json", {"lines": made})
    shown = [
        (
            line.policy,
            f"{line.percent} %",
            line.cache,
            line.seeds,
            f"{line.perplexity:.3f}",
            f"{line.kld:.4f}",
            f"{100 * line.recovered:.1f}",
            f"{100 * line.windows_se:.1f}",
            "" if line.seeds_sd is None else f"{100 * line.seeds_sd:.1f}",
            "" if line.bytes is None else f"{line.bytes:,}",
            "" if line.seconds is None else f"{line.seconds:.0f}",
        )
        for line in made
    ]
    names = ("policy", "budget", "cache", "seeds", "ppl", "KLD", "recovered %", "+-")
    more = ("sd of seeds", "bytes", "training s")
    log.table("What states recover", (*names, *more), shown)
