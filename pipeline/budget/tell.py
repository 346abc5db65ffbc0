"""What a budget run says and leaves: tables, budget.json, report.html, budget.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvsmith.pipeline.budget.choices import SIDES
from kvsmith.pipeline.budget.make import Point, Problem, best_uniform, gap
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.report.page import budget_section, page
from kvsmith.pipeline.report.provenance import provenance, told
from kvsmith.pipeline.stage import atomic_write, write_json

COLUMNS = ("cache", "bits", "bytes", "KLD predicted", "KLD held out", "+-")


def tell(problem: Problem, chosen: Sequence[Point], rivals: Sequence[Point], log: Run) -> None:
    """Say which level every layer got, and how the choices compare with uniform caches."""
    names = problem.levels.names
    for point in chosen[:1] if len(chosen) == 1 else ():
        owners = problem.record.source.base_model.geometry.owners
        pairs = zip(owners, point.found.picks, strict=True)
        rows = [(str(i), names[k], names[v]) for i, (k, v) in pairs]
        log.table(f"{point.bits:.3f} all-in bits", ("layer", "keys", "values"), rows)
    points = sorted((*chosen, *rivals), key=lambda p: (p.found.nbytes, p.name))
    title = f"at {problem.options.tokens:,} tokens; uniform caches beside the choice"
    log.table(title, COLUMNS, [cells(p) for p in points])
    for point in chosen:
        rival = best_uniform(rivals, point.found.nbytes)
        if rival is not None and point.kld:
            mean, se = gap(point, rival)
            spread = "" if se is None else f" +- {se:.1e}"
            log.say(
                f"{point.bits:.3f} bits: KLD {point.mean:.3e}, best uniform cache of no more bytes "
                f"({rival.name}, {rival.bits:.3f} bits) {rival.mean:.3e}; difference {mean:+.1e}"
                f"{spread} over {len(point.kld)} windows"
            )


def cells(point: Point) -> list[str]:
    """One row under `COLUMNS`."""
    count = len(point.kld)
    spread = ""
    if count > 1:
        variance = sum((x - point.mean) ** 2 for x in point.kld) / (count - 1)
        spread = f"{(variance / count) ** 0.5:.1e}"
    measured = f"{point.mean:.3e}" if count else ""
    loss, nbytes = f"{point.found.loss:.3e}", f"{point.found.nbytes:,}"
    return [point.name, f"{point.bits:.3f}", nbytes, loss, measured, spread]


def plain(point: Point) -> dict[str, Any]:
    """One point as plain data."""
    return {
        "name": point.name,
        "bits": point.bits,
        "bytes": point.found.nbytes,
        "kld_predicted": point.found.loss,
        "kld_heldout": list(point.kld),
        "picks": [list(pair) for pair in point.found.picks],
    }


def write(
    problem: Problem,
    chosen: Sequence[Point],
    front: Sequence[Point],
    rivals: Sequence[Point],
    folder: Path,
) -> None:
    """Leave budget.json, with sensitivities, prices and every choice, and report.html."""
    data = {
        **provenance(),
        "model": problem.record.source.base_model.id,
        "dataset": problem.record.source.dataset,
        "context": problem.options.tokens,
        "levels": list(problem.levels.names),
        "layers": list(problem.record.source.base_model.geometry.owners),
        "sides": list(SIDES),
        "loss": problem.loss.tolist(),
        "bytes": problem.price.sides.tolist(),
        "fixed_bytes": problem.price.fixed,
        "seed": problem.record.source.seed,
        "chosen": [plain(p) for p in chosen],
        "curve": [plain(p) for p in front],
        "uniform": [plain(p) for p in rivals],
    }
    write_json(folder / "budget.json", data)
    part = budget_section(data, told(data))
    atomic_write(folder / "report.html", page(str(data["model"]), [part]).encode())
