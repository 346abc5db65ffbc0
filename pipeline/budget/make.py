"""From a calibration to the best bundle under a budget, and to the whole front of a curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvsmith.bundle import Bundle
from kvsmith.pipeline.budget.choices import (
    Costs,
    Levels,
    Parameters,
    assemble,
    costs,
    parameters_of,
)
from kvsmith.pipeline.budget.options import BudgetOptions
from kvsmith.pipeline.budget.sensitivity import Meter, measure_layer
from kvsmith.pipeline.budget.solve import Solution, smallest, solve, uniform
from kvsmith.pipeline.calibration.parameters import parameters_for
from kvsmith.pipeline.calibration.record import RECORD, Record, layer_file, read_record
from kvsmith.pipeline.data import tokens_hash
from kvsmith.pipeline.evaluation.fidelity import paired
from kvsmith.pipeline.export import identity
from kvsmith.pipeline.fit import Sensitivity
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.stage import Stage, Stop, digest, locked, read_json, run_stage, write_json
from kvsmith.pipeline.workers import ALONE, Workers
from kvsmith.spec import CacheSpec, CodecSpec

VERSION = 1  # raised when the same tokens give other sensitivities


@dataclass(frozen=True)
class Point:
    """A choice on the way from few bytes to many.

    Attributes:
        name: "fit", or the level that is the same everywhere.
        found: the choice.
        bits: all-in bits of an element.
        kld: measured divergence of each held-out window, nats a token; empty without a check.
    """

    name: str
    found: Solution
    bits: float
    kld: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """Mean measured divergence; NaN without a check."""
        return sum(self.kld) / len(self.kld) if self.kld else float("nan")


@dataclass
class Problem:
    """Everything that a budget is spent by.

    Attributes:
        options: what was asked.
        record: the calibration.
        levels, fitted: the choices and their parameters.
        loss: [layers, 2, levels] float64, nats a token.
        price: bytes.
        meter: measures choices on held-out windows; None without a check.
    """

    options: BudgetOptions
    record: Record
    levels: Levels
    fitted: Sequence[Parameters]
    loss: Tensor
    price: Costs
    meter: Meter | None

    def point(self, name: str, found: Solution) -> Point:
        """A choice, measured where there is a meter."""
        shape = self.record.source.base_model.geometry
        bits = 8 * found.nbytes / (shape.elements * self.options.tokens)
        if self.meter is None:
            return Point(name, found, bits)
        spec = CacheSpec(assemble(self.levels, shape, found.picks))
        own = parameters_of(self.fitted, shape, found.picks)
        return Point(name, found, bits, tuple(self.meter.kld(spec, own).tolist()))

    def uniforms(self) -> list[Point]:
        """Every level, the same everywhere."""
        found = (uniform(i, self.loss, self.price) for i in range(len(self.levels)))
        return [self.point(n, s) for n, s in zip(self.levels.names, found, strict=True)]

    def curve(self) -> list[Point]:
        """The best choices from the smallest cache to the largest."""
        least = smallest(self.price)
        most = least + int(self.price.sides.amax(-1).sum())
        count, found = self.options.points, dict[Solution, None]()
        for i in range(count):
            found[solve(self.loss, self.price, least + (most - least) * i // (count - 1))] = None
        return [self.point("fit", s) for s in found]

    def bundle(self, point: Point, sensitivity: Sensitivity) -> Bundle:
        """The bundle of a choice."""
        base = self.record.source.base_model
        spec = CacheSpec(assemble(self.levels, base.geometry, point.found.picks))
        own = parameters_of(self.fitted, base.geometry, point.found.picks)
        quality = {"kld_predicted": point.found.loss}
        if point.kld:
            quality["kld_heldout"] = point.mean
        provenance = self.record.provenance(sensitivity)
        return Bundle.create(spec, own, base, provenance, quality)


def pose(
    options: BudgetOptions,
    choices: Levels,
    folder: Path,
    windows: Tensor,
    heldout: Tensor | None,
    model: PreTrainedModel,
    sensitivity: Sensitivity,
    log: Run,
    stop: Stop,
    workers: Workers = ALONE,
) -> Problem:
    """Fit every level and measure every choice; what was measured before is read back.

    Args:
        options: what was asked.
        choices: the levels.
        folder: a finished calibration that observed what they need.
        windows: [n, T] int64, calibration text.
        heldout: [n, T] int64 text for the check, or None.
        model: in evaluation mode.
        sensitivity: weights of the codebook fit.
        log, stop: of the run.
        workers: processes that divide the layers.
    """
    record = read_record(folder)
    shape = record.source.base_model.geometry
    fitted = workers.in_turn(lambda: fitted_levels(choices, folder, sensitivity), stop)
    pre = options.prefill or windows.shape[1] // 8

    def meter(ids: Tensor) -> Meter:
        return Meter(model, ids, pre, options.step, options.batch)

    facts: dict[str, object] = {
        "levels": choices.codecs,
        "windows": [tokens_hash(windows), *windows.shape],
        "steps": [pre, options.step],
        "fit": sensitivity,
        "version": VERSION,
    }
    made = partial(meter, windows)
    loss = _losses(choices, fitted, folder, facts, made, record, log, stop, workers)
    price = costs(choices, shape, options.tokens)
    check = None if heldout is None or not workers.leads else meter(heldout)
    return Problem(options, record, choices, fitted, loss, price, check)


def fitted_levels(choices: Levels, folder: Path, sensitivity: Sensitivity) -> list[Parameters]:
    """Parameters of every level; a dense window has none."""
    found: dict[CodecSpec, Parameters] = {}
    for codec in (replace(c, recent=choices.exact.recent) for c in choices.codecs):
        if codec not in found:
            found[codec] = parameters_for(folder, codec, None, sensitivity)
    return [found[replace(c, recent=choices.exact.recent)] for c in choices.codecs]


def _losses(
    choices: Levels,
    fitted: Sequence[Parameters],
    folder: Path,
    facts: dict[str, object],
    meter: Callable[[], Meter],
    record: Record,
    log: Run,
    stop: Stop,
    workers: Workers,
) -> Tensor:
    """[layers, 2, levels] float64; one stage a layer."""
    made: list[Meter] = []
    owners, name = record.source.base_model.geometry.owners, digest(facts)[:8]
    paths = {layer: f"sensitivity/{name}/{layer_file(layer)}.json" for layer in owners}
    own = workers.share(owners)
    alone = locked(folder) if workers.leads else nullcontext()
    with alone, log.progress(len(own) * 2 * len(choices), "sensitivity") as bar:
        workers.wait(stop)  # the folder is swept
        for layer in own:
            path = paths[layer]

            def run(layer=layer, path=path) -> None:
                if not made:
                    made.append(meter())
                write_json(
                    folder / path, measure_layer(made[0], choices, fitted, layer, bar.advance)
                )

            stage = Stage(
                f"sensitivity-{name}-{layer_file(layer)}", (folder / RECORD,), (path,), run, facts
            )
            run_stage(stage, folder)
            stop.leave_if_asked()
        workers.wait(stop)
    rows = [read_json(folder / path) for path in paths.values()]
    return torch.tensor(rows, dtype=torch.float64)


def save(problem: Problem, point: Point, root: Path, sensitivity: Sensitivity) -> Path:
    """Write the bundle of a choice to `root`/fit<bits>-<hash8>.

    Raises:
        BundleError: the folder holds something else.
    """
    bundle = problem.bundle(point, sensitivity)
    return bundle.save_pretrained(root / f"fit{point.bits:.2f}-{identity(bundle)}", overwrite=True)


def best_uniform(points: Sequence[Point], nbytes: int) -> Point | None:
    """The measured best of those that take no more bytes."""
    fitting = [p for p in points if p.found.nbytes <= nbytes]
    return min(fitting, key=lambda p: p.mean if p.kld else p.found.loss, default=None)


def gap(first: Point, second: Point) -> tuple[float, float | None]:
    """Paired difference of measured divergence, nats a token, and its standard error."""
    d = paired(first.kld, second.kld)
    return d.mean, d.se
