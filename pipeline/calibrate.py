"""calibrate.py: statistics of a model's keys and values, and the parameters of codecs fitted to
them.

Two kinds of stages. `collect` streams the calibration tokens once, forward and backward, into
statistics. `fit-<codec>-layer-000`, ... turn the statistics of a layer into a codec's parameters.
Both skip what is finished; an interrupted pass goes on from its last checkpoint and ends in the
same bytes. Processes that torchrun or `accelerate launch` starts divide the shards of the tokens
and then the layers among them, which changes no byte.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from kvsmith.errors import explain
from kvsmith.hf import geometry
from kvsmith.layout import check_geometry
from kvsmith.pipeline.budget.run import Request, request, spend
from kvsmith.pipeline.calibration import (
    Record,
    Source,
    describe_model,
    fit_stages,
    owns_parameters,
    read_record,
)
from kvsmith.pipeline.calibration.options import CalibrateConfig, smoke
from kvsmith.pipeline.calibration.predict import COPIES, predict
from kvsmith.pipeline.calibration.record import RECORD, layer_file
from kvsmith.pipeline.calibration.shards import Shards
from kvsmith.pipeline.calibration.summary import report
from kvsmith.pipeline.codecs import codec_name, load_codec
from kvsmith.pipeline.config import input_path, output_path
from kvsmith.pipeline.data import DataConfig, HubData, PydocsData, token_blocks, tokens_hash
from kvsmith.pipeline.data.split import Split
from kvsmith.pipeline.log import NoLogger, Run
from kvsmith.pipeline.model import load_model, model_context
from kvsmith.pipeline.stage import (
    Stage,
    Stop,
    digest,
    is_finished,
    locked,
    run_stage,
    write_json,
)
from kvsmith.pipeline.statistics import plan_for
from kvsmith.pipeline.workers import ALONE, Workers, start_workers
from kvsmith.spec import CacheSpec, CodecSpec

__all__ = ["CalibrateConfig", "calibrate", "check_context", "describe", "run", "smoke"]

CALIBRATIONS = "artifacts/calibration"
STATISTICS_VERSION = 2  # raised when the same tokens give other statistics


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
    workers = start_workers(cfg.model)
    folder = Path(workers.leaders(str(folder)))
    if cfg.debug.smoke:
        cfg = smoke(cfg, folder)
    codecs, lead = _codecs(cfg), workers.leads
    logger = cfg.logger if lead else NoLogger()
    with Run(folder if lead else None, logger, cfg, quiet=not lead) as log:
        began = time.monotonic()
        model, tokenizer = load_model(cfg.model)  # SIGTERM ends this at once; nothing is lost
        check_context(model, cfg.length)
        asked = request(cfg.fit, cfg.target_bits, cfg.curve, geometry(model.config))
        if asked is not None:
            asked.options.window(model_context(model.config))

        def read(split: Split, count: int, length: int) -> Tensor:
            return token_blocks(tokenizer, cfg.data, split, count, length, seed=cfg.seed)

        tokens = read("calibration", cfg.samples, cfg.length)
        with Stop() as stop:
            if cfg.dry_run:
                if lead:
                    loading, count = time.monotonic() - began, workers.count
                    _rehearse(cfg, codecs, model, tokens, loading, folder, log, stop, asked, count)
                return folder
            found = calibrate(cfg, codecs, model, tokens, log, stop, asked, workers)
            if asked is not None:
                root = output_path(cfg.bundles or "artifacts/bundles") / cfg.model.label
                spend(asked, found, model, read, cfg.sensitivity, root, folder, log, stop, workers)
            return found


def calibrate(
    cfg: CalibrateConfig,
    codecs: Mapping[str, CodecSpec],
    model: PreTrainedModel,
    tokens: Tensor,
    log: Run,
    stop: Stop,
    asked: Request | None = None,
    workers: Workers = ALONE,
) -> Path:
    """Calibrate a loaded model on tokens, also for what is asked of the budget solver; arguments
    and result as of `run`.
    """
    extra = asked.choices.codecs if asked else ()
    source = describe(cfg, (*codecs.values(), *extra), model, tokens)
    name = digest([STATISTICS_VERSION, source])[:8]
    if (first := workers.leaders(name, stop)) != name:
        expected = f"{first} as in process 0 (of the same model and text)"
        raise ValueError(explain(f"process {workers.rank}", "calibration", expected, name))
    folder = output_path(cfg.folder or CALIBRATIONS) / cfg.model.label / name
    with locked(folder) if workers.leads else nullcontext():
        workers.wait(stop)  # the folder is there, and swept
        _collect(cfg, source, model, tokens, folder, log, stop, workers)
        record = read_record(folder)
        fitted = {n: c for n, c in codecs.items() if owns_parameters(c, record)}
        _fit(cfg, record, fitted, folder, log, stop, workers)
        workers.wait(stop)
    if workers.leads:
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
    processes: int,
) -> None:
    """Predict what `calibrate` of these tokens would take; leaves the prediction in `folder`."""

    def one(place: Path, quiet: Run) -> Path:
        small = replace(cfg, samples=COPIES, batch_size=1, shards=1, folder=str(place))
        return calibrate(small, codecs, model, tokens[:1].repeat(COPIES, 1), quiet, stop, asked)

    extra = asked.choices.codecs if asked else ()
    source = describe(cfg, (*codecs.values(), *extra), model, tokens)
    prediction = predict(one, source, model, loading, processes)
    write_json(folder / "prediction.json", prediction)
    log.say(str(prediction))


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
        shards=cfg.shards,
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
    workers: Workers,
) -> None:
    shards = Shards(folder, source, model, tokens, cfg.checkpoint_seconds, log, stop, workers)
    files = [f"statistics/{layer_file(i)}.safetensors" for i in source.base_model.geometry.owners]
    stage = Stage("collect", (), (RECORD, *files), shards.run, source)
    if workers.leads:
        if not run_stage(stage, folder):
            log.say(f"statistics of {tokens.numel():,} tokens were collected before")
        shards.clear()
    elif not is_finished(stage, folder):
        shards.run()
    workers.wait(stop)


def _fit(
    cfg: CalibrateConfig,
    record: Record,
    codecs: Mapping[str, CodecSpec],
    folder: Path,
    log: Run,
    stop: Stop,
    workers: Workers,
) -> None:
    layers = workers.share(record.source.base_model.geometry.owners)
    if not codecs:
        log.say("no codec owns parameters; nothing to fit")
        return
    with log.progress(len(layers) * len(codecs), "fit") as bar:
        for stage in fit_stages(folder, record, codecs, cfg.sensitivity, layers):
            run_stage(stage, folder)
            bar.advance()
            stop.leave_if_asked()
