"""From a calibration and a trained state to the bundle that keeps as many tokens as pays."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from kvsmith.bundle import Bundle
from kvsmith.pipeline.budget.choices import Levels
from kvsmith.pipeline.budget.kept import Kept, State, measured
from kvsmith.pipeline.budget.make import fitted_levels
from kvsmith.pipeline.budget.options import BudgetOptions
from kvsmith.pipeline.budget.sensitivity import Meter
from kvsmith.pipeline.calibration.record import Record, read_record
from kvsmith.pipeline.fit import Sensitivity
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.report.chart import Axis, Chart, Series
from kvsmith.pipeline.report.page import page, table_of
from kvsmith.pipeline.report.provenance import provenance, told
from kvsmith.pipeline.report.svg import render
from kvsmith.pipeline.stage import atomic_write, write_json

COLUMNS = ("stored as", "tokens kept", "bits", "bytes", "KLD", "KLD held out", "+-")


def trade(
    options: BudgetOptions,
    levels: Levels,
    state: State,
    caches: Sequence[Kept],
    calibration: Path,
    model: PreTrainedModel,
    windows: Tensor,
    heldout: Tensor | None,
    sensitivity: Sensitivity,
) -> tuple[list[Kept], Bundle]:
    """Measure caches of equal bytes, and make the bundle of the best.

    Args:
        options: what was asked.
        levels: the choices; caches: the most tokens of each.
        state: trained.
        calibration: finished; has observed what the levels need.
        model: in evaluation mode.
        windows: [n, context] int64, calibration text; heldout: the same of held-out text, or None.
        sensitivity: weights of the codebook fit.

    Returns:
        The caches, measured, the best first; and its bundle.

    Raises:
        ValueError: the state is of another model.
    """
    record = read_record(calibration)
    base = record.source.base_model
    state.record.source.base_model.check(base, "fit.trained")
    fitted = fitted_levels(levels, calibration, sensitivity)
    block = levels.exact.block_size
    prefill = max((options.prefill or windows.shape[1] // 8) // block, 1) * block

    def meter(ids: Tensor) -> Meter:
        return Meter(model, ids, prefill, block, options.batch)

    found = measured(
        caches, fitted, state, meter(windows), None if heldout is None else meter(heldout)
    )
    best = found[0]
    own = state.parameters(best.spec, {} if best.level is None else fitted[best.level])
    quality = {"kld_calibration": best.mean}
    if best.heldout:
        quality["kld_heldout"] = sum(best.heldout) / len(best.heldout)
    made = record.provenance(sensitivity)
    return found, Bundle.create(best.spec, own, base, made, quality)


def tell(found: Sequence[Kept], record: Record, context: int, log: Run, folder: Path) -> None:
    """Say how the caches compare; leave kept.json and report.html."""
    per = record.source.base_model.geometry.elements * context / 8
    rows = [_cells(one, per) for one in found]
    title = f"equal bytes at {context:,} tokens: tokens kept against their bits"
    log.table(title, COLUMNS, rows)
    source = record.source
    facts = {**provenance(), "model": source.base_model.id, "context": context, "seed": source.seed}
    write_json(folder / "kept.json", {**facts, "caches": [one.plain() for one in found]})
    series = tuple(
        Series(one.name, ((float(one.tokens or context), one.mean),), line=False) for one in found
    )
    label = "KLD on calibration text, nats a token"
    chart = Chart("Divergence by tokens kept", Axis("tokens of a layer"), Axis(label), series)
    name = source.base_model.id
    body = [
        f"<h1>{escape(name)}: tokens against bits</h1>",
        table_of(title.capitalize(), COLUMNS, rows, {found[0].name}),
        render(chart),
        f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in told(facts))}</ul>",
    ]
    atomic_write(folder / "report.html", page(name, body).encode())


def _cells(one: Kept, per: float) -> list[str]:
    held, n, spread = "", len(one.heldout), ""
    if n:
        mean = sum(one.heldout) / n
        held = f"{mean:.3e}"
    if n > 1:
        spread = f"{(sum((x - mean) ** 2 for x in one.heldout) / (n - 1) / n) ** 0.5:.1e}"
    kept = "all" if one.tokens is None else str(one.tokens)
    return [one.name, kept, f"{one.nbytes / per:.3f}", f"{one.nbytes:,}", f"{one.mean:.3e}", held,
            spread]  # fmt: skip
