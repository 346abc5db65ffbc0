"""How calibrate.py spends a budget: `target_bits=3.0`, `fit.bytes=20GiB`, `curve=true`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from kvsmith.errors import explain
from kvsmith.geometry import ModelGeometry
from kvsmith.pipeline.budget.choices import Levels, costs, levels
from kvsmith.pipeline.budget.kept import Kept, State, candidates
from kvsmith.pipeline.budget.make import pose, save
from kvsmith.pipeline.budget.options import BudgetOptions
from kvsmith.pipeline.budget.solve import smallest, solve
from kvsmith.pipeline.budget.tell import tell, write
from kvsmith.pipeline.budget.trade import tell as tell_trade
from kvsmith.pipeline.budget.trade import trade
from kvsmith.pipeline.calibration.record import read_record
from kvsmith.pipeline.codecs import load_codec
from kvsmith.pipeline.config import input_path
from kvsmith.pipeline.data.split import Split
from kvsmith.pipeline.evaluation.find import shown
from kvsmith.pipeline.export import cache_name, identity
from kvsmith.pipeline.fit import Sensitivity
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.model import model_context
from kvsmith.pipeline.report.budget import plot_budget
from kvsmith.pipeline.stage import Stop
from kvsmith.pipeline.workers import ALONE, Workers


@dataclass(frozen=True)
class Request:
    """What is asked of the solver, checked against the model's shape.

    Attributes:
        options: as configured.
        choices: the levels.
        budget: bytes of one row; None for a curve alone.
        curve: whether the whole front is wanted.
        where: configuration path of the budget.
        state, kept: the trained state, and what it may be weighed as; none where all tokens stay.
    """

    options: BudgetOptions
    choices: Levels
    budget: int | None
    curve: bool
    where: str
    state: State | None = None
    kept: tuple[Kept, ...] = ()


def request(
    options: BudgetOptions, target_bits: float | None, curve: bool, shape: ModelGeometry
) -> Request | None:
    """Read what is asked.

    Args:
        options: group `fit`.
        target_bits: all-in bits an element.
        curve: the whole front.
        shape: the model.

    Returns:
        None where nothing is asked.

    Raises:
        ValueError: a budget that nothing fits; names the smallest possible.
    """
    budget = options.budget(target_bits, shape)
    if budget is None and not curve:
        return None
    template = load_codec(options.template, "fit.template")
    choices = levels(
        template, options.widths, options.fractions, shape, options.ranks, options.recents
    )
    where = "fit.bytes" if target_bits is None else "target_bits"
    if options.trained is not None:
        if budget is None or curve:
            expected, remedy = "false, with a budget", "Give target_bits or fit.bytes."
            raise ValueError(explain("curve", "value with fit.trained", expected, curve, remedy))
        state = State.read(input_path(options.trained), shape)
        kept = candidates(choices, state, shape, options.tokens, budget, where)
        return Request(options, choices, budget, False, where, state, kept)
    if budget is not None:
        least = smallest(costs(choices, shape, options.tokens))
        if budget < least:
            bits = 8 * least / (shape.elements * options.tokens)
            length = f"at {options.tokens:,} tokens"
            expected = f"at least {bits:.3f} all-in bits ({least:,} bytes) {length}"
            remedy = "Allow fewer bits with fit.widths, or a longer fit.context."
            raise ValueError(explain(where, "budget", expected, f"{budget:,} bytes", remedy))
    return Request(options, choices, budget, curve, where)


def spend(
    asked: Request,
    calibration: Path,
    model: PreTrainedModel,
    read: Callable[[Split, int, int], Tensor],
    sensitivity: Sensitivity,
    root: Path,
    folder: Path,
    log: Run,
    stop: Stop,
    workers: Workers = ALONE,
) -> Path | None:
    """Measure, solve, compare, write.

    Args:
        asked: see `request`.
        calibration: finished; has observed what the levels need.
        model: in evaluation mode.
        read: gives [n, length] tokens of a split.
        sensitivity: weights of the codebook fit.
        root: folder of the model's bundles.
        folder: of this run; budget.json, report.html and PNGs go there.
        log, stop: of the run.
        workers: processes that divide the layers; the first does the rest.

    Returns:
        The bundle's folder; None for a curve alone, and in processes that do not lead.
    """
    o = asked.options
    length = o.window(model_context(model.config))
    windows = read("calibration", o.windows, length)
    heldout = read("heldout", o.check, length) if o.check else None
    if asked.state is not None:
        if not workers.leads:
            return None
        return _weigh(asked, calibration, model, windows, heldout, sensitivity, root, folder, log)
    problem = pose(
        o, asked.choices, calibration, windows, heldout, model, sensitivity, log, stop, workers
    )
    if not workers.leads:
        return None
    rivals, path = problem.uniforms(), None
    front, chosen = problem.curve() if asked.curve else [], []
    if front:
        tell(problem, front, rivals, log)
        plot_budget(problem, front, rivals, folder / "curve.png")
    if asked.budget is not None:
        found = solve(problem.loss, problem.price, asked.budget, asked.where)
        chosen = [problem.point("fit", found)]
        tell(problem, chosen, rivals, log)
        plot_budget(problem, chosen, rivals, folder / "budget.png")
        path = save(problem, chosen[0], root, sensitivity)
        log.say(f"bundle: {shown(path)}")
    write(problem, chosen, front, rivals, folder)
    log.say(f"written: {shown(folder)}")
    return path


def _weigh(
    asked: Request,
    calibration: Path,
    model: PreTrainedModel,
    windows: Tensor,
    heldout: Tensor | None,
    sensitivity: Sensitivity,
    root: Path,
    folder: Path,
    log: Run,
) -> Path:
    """Tokens against bits; arguments and result as of `spend`."""
    o = asked.options
    assert asked.state is not None
    found, bundle = trade(
        o, asked.choices, asked.state, asked.kept, calibration, model, windows, heldout, sensitivity
    )
    record = read_record(calibration)
    tell_trade(found, record, o.tokens, log, folder)
    bits = 8 * found[0].nbytes / (record.source.base_model.geometry.elements * o.tokens)
    name = f"fit{bits:.2f}-{cache_name(bundle.spec)}-{identity(bundle)}"
    path = bundle.save_pretrained(root / name, overwrite=True)
    log.say(f"bundle: {shown(path)}")
    log.say(f"written: {shown(folder)}")
    return path
