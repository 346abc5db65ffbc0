"""calibrate.py: statistics of a model's keys and values, and the parameters of codecs fitted to
them.

Two kinds of stages. `collect` streams the calibration tokens once, forward and backward, into
statistics. `fit-<codec>-layer-000`, ... turn the statistics of a layer into a codec's parameters.
Both skip what is finished; an interrupted pass goes on from its last checkpoint and ends in the
same bytes.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from kvsmith.errors import explain
from kvsmith.eviction.policy import KeepAll
from kvsmith.hf import geometry
from kvsmith.layout import check_geometry
from kvsmith.pipeline.budget.options import BudgetOptions
from kvsmith.pipeline.budget.run import Request, request, spend
from kvsmith.pipeline.calibration import (
    Record,
    Source,
    describe_model,
    fit_stages,
    owns_parameters,
    read_record,
)
from kvsmith.pipeline.calibration.collect import Collect
from kvsmith.pipeline.calibration.predict import COPIES, predict
from kvsmith.pipeline.calibration.record import RECORD, layer_file
from kvsmith.pipeline.calibration.summary import report
from kvsmith.pipeline.codecs import codec_name, load_codec
from kvsmith.pipeline.config import DebugConfig, input_path, output_path
from kvsmith.pipeline.data import DataConfig, HubData, PydocsData, token_blocks, tokens_hash
from kvsmith.pipeline.data.split import Split
from kvsmith.pipeline.fit import Sensitivity
from kvsmith.pipeline.less.options import EvictionChoice
from kvsmith.pipeline.log import LoggerConfig, NoLogger, Run
from kvsmith.pipeline.model import ModelConfig, load_model, model_context
from kvsmith.pipeline.stage import Stage, Stop, digest, locked, run_stage, write_json
from kvsmith.pipeline.statistics import plan_for
from kvsmith.spec import CacheSpec, CodecSpec

CALIBRATIONS = "artifacts/calibration"
STATISTICS_VERSION = 2  # raised when the same tokens give other statistics


@dataclass(frozen=True)
class CalibrateConfig:
    """What is calibrated, and on what.

    Args:
        model: the model.
        data: text; its calibration split is used.
        codec: one more codec to fit; None fits `codecs` alone.
        codecs: names of `conf/codec` whose parameters are fitted.
        eviction: calibration does not depend on it.
        samples: sequences.
        length: tokens of a sequence.
        batch_size: sequences a forward and backward pass.
        sinks: first tokens of every sequence that are left out; the codecs' number of sinks.
        seed: of the choice of sequences.
        fisher: collect Fisher information, which takes the backward pass.
        sensitivity: weights of the codebook fit: fisher, fisher_scale or none.
        max_fraction: largest share of outliers that key ranges can be fitted with later.
        value_fractions: shares of outliers that values are observed with.
        target_bits: all-in bits an element of a cache whose layers share them best; writes its
            bundle.
        curve: the best caches from the smallest to the largest.
        fit: how such caches are found.
        bundles: folder of all bundles; None is `artifacts/bundles`, or with `debug=smoke` the
            folder of this run's logs.
        checkpoint_seconds: time between checkpoints of the pass.
        dry_run: take one sample the whole way, predict time, memory and disk, and keep nothing.
        folder: where calibrations go; None is `artifacts/calibration`, or with `debug=smoke` the
            folder of this run's logs.
        logger: where else figures go.
        debug: `debug=smoke` takes a few short sequences.
    """

    model: ModelConfig
    data: DataConfig
    codec: CodecSpec | None = None
    codecs: tuple[str, ...] = ()
    eviction: EvictionChoice = field(default_factory=KeepAll)
    samples: int = 64
    length: int = 512
    batch_size: int = 8
    sinks: int = 4
    seed: int = 0
    fisher: bool = True
    sensitivity: Sensitivity = "fisher"
    max_fraction: float = 0.02
    value_fractions: tuple[float, ...] = (0.0, 0.01)
    target_bits: float | None = None
    curve: bool = False
    fit: BudgetOptions = field(default_factory=BudgetOptions)
    bundles: str | None = None
    checkpoint_seconds: float = 20.0
    dry_run: bool = False
    folder: str | None = None
    logger: LoggerConfig = field(default_factory=NoLogger)
    debug: DebugConfig = field(default_factory=DebugConfig)

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("batch_size", 1), ("sinks", 0)):
            if getattr(self, name) < least:
                raise ValueError(explain(name, "value", f"at least {least}", getattr(self, name)))
        if self.length < self.sinks + 2:
            expected = f"at least sinks + 2 = {self.sinks + 2}"
            raise ValueError(explain("length", "tokens of a sequence", expected, self.length))
        for name, values in (
            ("max_fraction", (self.max_fraction,)),
            ("value_fractions", self.value_fractions),
        ):
            for value in values:
                if not 0 <= value < 0.5:
                    raise ValueError(explain(name, "share of elements", "in [0, 0.5)", value))
        if not self.fisher and self.sensitivity != "none":
            remedy = "Use sensitivity=none, or fisher=true."
            raise ValueError(
                explain("sensitivity", "value", "none with fisher=false", self.sensitivity, remedy)
            )


def smoke(cfg: CalibrateConfig, folder: Path) -> CalibrateConfig:
    """The same on a few short sequences, away from calibrations that export.py would find."""
    return replace(
        cfg,
        samples=min(cfg.samples, 4),
        length=min(cfg.length, 128),
        batch_size=min(cfg.batch_size, 2),
        folder=cfg.folder or str(folder / "calibration"),
        bundles=cfg.bundles or str(folder / "bundles"),
        fit=replace(cfg.fit, windows=2, check=2, length=min(cfg.fit.length or 64, 64), points=2),
    )


def run(cfg: CalibrateConfig, folder: Path) -> Path:
    """Calibrate.

    Args:
        cfg: what is asked for.
        folder: of this run's logs.

    Returns:
        The calibration's folder, `artifacts/calibration/<model>/<hash8>`.

    Raises:
        FileNotFoundError, ValueError, TypeError: what the user got wrong, in one line.
        SystemExit: 143 after SIGTERM; the same call then continues.
    """
    if cfg.debug.smoke:
        cfg = smoke(cfg, folder)
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        remedy = "Start it without torchrun; model.device_map=auto spreads a model over devices."
        raise ValueError(explain("calibrate.py", "processes", "1", processes, remedy))
    codecs = _codecs(cfg)
    with Run(folder, cfg.logger, cfg) as log:
        began = time.monotonic()
        model, tokenizer = load_model(cfg.model)  # SIGTERM ends this at once; nothing is lost
        check_context(model, cfg.length)
        asked = request(cfg.fit, cfg.target_bits, cfg.curve, geometry(model.config))

        def read(split: Split, count: int, length: int) -> Tensor:
            return token_blocks(tokenizer, cfg.data, split, count, length, seed=cfg.seed)

        tokens = read("calibration", cfg.samples, cfg.length)
        with Stop() as stop:
            if cfg.dry_run:
                loading = time.monotonic() - began
                return _rehearse(cfg, codecs, model, tokens, loading, folder, log, stop, asked)
            found = calibrate(cfg, codecs, model, tokens, log, stop, asked)
            if asked is not None:
                root = output_path(cfg.bundles or "artifacts/bundles") / cfg.model.label
                spend(asked, found, model, read, cfg.sensitivity, root, folder, log, stop)
            return found


def calibrate(
    cfg: CalibrateConfig,
    codecs: Mapping[str, CodecSpec],
    model: PreTrainedModel,
    tokens: Tensor,
    log: Run,
    stop: Stop,
    asked: Request | None = None,
) -> Path:
    """Calibrate a loaded model on tokens, also for what is asked of the budget solver; arguments
    and result as of `run`.
    """
    extra = asked.choices.codecs if asked else ()
    source = describe(cfg, (*codecs.values(), *extra), model, tokens)
    name = digest([STATISTICS_VERSION, source])[:8]
    folder = output_path(cfg.folder or CALIBRATIONS) / cfg.model.label / name
    with locked(folder):
        _collect(cfg, source, model, tokens, folder, log, stop)
        record = read_record(folder)
        fitted = {n: c for n, c in codecs.items() if owns_parameters(c, record)}
        _fit(cfg, record, fitted, folder, log, stop)
    report(record, fitted, folder, log)
    return folder


def _rehearse(
    cfg: CalibrateConfig,
    codecs: Mapping[str, CodecSpec],
    model: PreTrainedModel,
    tokens: Tensor,
    loading: float,
    folder: Path,
    log: Run,
    stop: Stop,
    asked: Request | None,
) -> Path:
    """Predict what `calibrate` of these tokens would take; leaves the prediction in `folder`."""

    def one(place: Path, quiet: Run) -> Path:
        small = replace(cfg, samples=COPIES, batch_size=1, folder=str(place))
        return calibrate(small, codecs, model, tokens[:1].repeat(COPIES, 1), quiet, stop, asked)

    extra = asked.choices.codecs if asked else ()
    source = describe(cfg, (*codecs.values(), *extra), model, tokens)
    prediction = predict(one, source, model, loading)
    write_json(folder / "prediction.json", prediction)
    log.say(str(prediction))
    return folder


def describe(
    cfg: CalibrateConfig, codecs: Sequence[CodecSpec], model: PreTrainedModel, tokens: Tensor
) -> Source:
    """Everything that the statistics will depend on."""
    base, weights = describe_model(cfg.model, model)
    for codec in codecs:
        check_geometry(CacheSpec(codec), base.geometry)
    total = tokens.shape[0] * (tokens.shape[1] - cfg.sinks)
    plan = plan_for(codecs, total, cfg.max_fraction, cfg.value_fractions, cfg.fisher)
    dataset, revision = _dataset(cfg.data)
    return Source(
        base_model=base,
        weights_hash=weights,
        dtype=str(model.dtype).removeprefix("torch."),
        dataset=dataset,
        revision=revision,
        seed=cfg.seed,
        samples=cfg.samples,
        length=cfg.length,
        tokens_hash=tokens_hash(tokens),
        batch_size=cfg.batch_size,
        sinks=cfg.sinks,
        plan=plan,
    )


def check_context(model: PreTrainedModel, length: int) -> None:
    """Refuse sequences longer than the model was made for."""
    limit = model_context(model.config)
    if length > limit:
        expected = f"at most the model's context of {limit}"
        raise ValueError(explain("length", "tokens of a sequence", expected, length))


def _codecs(cfg: CalibrateConfig) -> dict[str, CodecSpec]:
    codecs = {n: load_codec(n, f"codecs[{i}]") for i, n in enumerate(cfg.codecs)}
    if cfg.codec is not None:
        codecs[codec_name(cfg.codec)] = cfg.codec
    return codecs


def _dataset(data: DataConfig) -> tuple[str, str | None]:
    if isinstance(data, PydocsData):
        return data.kind, f"python {platform.python_version()}"
    if isinstance(data, HubData) and not input_path(data.path).is_dir():
        return data.path, data.revision
    return Path(data.path).name, None


def _collect(
    cfg: CalibrateConfig,
    source: Source,
    model: PreTrainedModel,
    tokens: Tensor,
    folder: Path,
    log: Run,
    stop: Stop,
) -> None:
    collect = Collect(folder, source, model, tokens, cfg.checkpoint_seconds, log, stop)
    files = [f"statistics/{layer_file(i)}.safetensors" for i in source.base_model.geometry.owners]
    stage = Stage("collect", (), (RECORD, *files), collect.run, source)
    if not run_stage(stage, folder):
        log.say(f"statistics of {tokens.numel():,} tokens were collected before")
    collect.clear()


def _fit(
    cfg: CalibrateConfig,
    record: Record,
    codecs: Mapping[str, CodecSpec],
    folder: Path,
    log: Run,
    stop: Stop,
) -> None:
    total = len(record.source.base_model.geometry.owners) * len(codecs)
    if not total:
        log.say("no codec owns parameters; nothing to fit")
        return
    with log.progress(total, "fit") as bar:
        for stage in fit_stages(folder, record, codecs, cfg.sensitivity):
            run_stage(stage, folder)
            bar.advance()
            stop.leave_if_asked()
