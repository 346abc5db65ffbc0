"""`train.py`: a model from scratch (`experiment=...`), one whose layers share (`cla=...`), or LESS
states (`less=...`)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvsmith.cla import Groups, Map
from kvsmith.errors import explain
from kvsmith.eviction.policy import KeepAll
from kvsmith.pipeline.config import DebugConfig, experiments, output_path
from kvsmith.pipeline.data import DataConfig, PydocsData
from kvsmith.pipeline.less.options import EvictionChoice, LessTraining
from kvsmith.pipeline.less.run import predict as predict_less
from kvsmith.pipeline.less.run import train_less
from kvsmith.pipeline.log import LoggerConfig, NoLogger, Run
from kvsmith.pipeline.model import ModelConfig
from kvsmith.pipeline.ranks import world_size
from kvsmith.pipeline.stage import write_json
from kvsmith.pipeline.training.division import Division
from kvsmith.pipeline.training.launch import asked_sharding
from kvsmith.pipeline.training.owner_map import Measured
from kvsmith.pipeline.training.plan import Optim
from kvsmith.pipeline.training.predict import predict
from kvsmith.pipeline.training.pretrain import Pretrain, pretrain
from kvsmith.pipeline.training.uptrain import Uptrain, uptrain
from kvsmith.pipeline.workers import start_workers
from kvsmith.spec import CodecSpec


@dataclass(frozen=True)
class TrainConfig:
    """One training run; `conf/train.yaml`.

    Args:
        model: names the result and the device.
        data: text.
        pretrain: set by `experiment=...`.
        cla: which layers share keys and values.
        uptrain: how a trained model becomes one that shares; without an experiment.
        less: set by `less=...`, which sets the eviction too.
        codec: how kept tokens are stored while states are trained.
        eviction: what states are trained for.
        output: model folder to write, None is `model.path`; for states the folder of results, None
            is `artifacts/less/<model>`; for a shared model None is the run's own folder.
        own_folder: a pretrained model goes into this start's own folder.
        work: folder of unfinished runs.
        overwrite: replace a finished model of another configuration.
        pieces: in which a process computes its rows of a batch, to need less memory; not of states.
        dry_run: say what training will take, and keep nothing: with `less` by arithmetic, else from
            a few steps that go the whole way.
        logger: where scalars go.
        debug: `debug=smoke` trains a toy for seconds.
    """

    model: ModelConfig
    data: DataConfig
    logger: LoggerConfig
    debug: DebugConfig
    uptrain: Uptrain
    cla: Groups | Map | Measured = field(default_factory=lambda: Groups(factor=1))
    pretrain: Pretrain | None = None
    less: LessTraining | None = None
    codec: CodecSpec | None = None
    eviction: EvictionChoice = field(default_factory=KeepAll)
    output: str | None = None
    own_folder: bool = False
    work: str = "runs/train"
    overwrite: bool = False
    pieces: int = 1
    dry_run: bool = False


def run(cfg: TrainConfig, folder: Path) -> None:
    """Do the training that the configuration describes.

    Args:
        cfg: the configuration.
        folder: this start's own folder; holds the composed configuration.

    Raises:
        ValueError: nothing to train was chosen, or several things, or the training refuses.
    """
    sharing = not (isinstance(cfg.cla, Groups) and cfg.cla.factor == 1)
    if cfg.less is not None:
        if cfg.pretrain is not None or sharing:
            given = "experiment" if cfg.pretrain is not None else "cla"
            remedy = "Train one; states are trained for a finished model."
            raise ValueError(explain("train", "less", f"left out with {given}", "both", remedy))
        _train_less(cfg, cfg.less, folder)
        return
    if cfg.pretrain is None and not sharing:
        names = [*experiments("pretrain"), *experiments("cla")]
        listed = ", ".join(f"experiment={name}" for name in names)
        expected = f"chosen: {listed}; or cla=factor2; or less=h2o_budget512"
        raise ValueError(explain("train", "experiment", expected, "none"))
    if cfg.dry_run:
        _predict(cfg, folder)
        return
    workers = start_workers(cfg.model)
    division = Division(workers, cfg.pieces, asked_sharding(os.environ, workers.count))
    folder = Path(division.workers.leaders(str(folder)))
    if cfg.pretrain is not None:
        _pretrain(cfg, cfg.pretrain, folder, division)
    else:
        _uptrain(cfg, folder, division)


def _predict(cfg: TrainConfig, folder: Path) -> None:
    """Say what a training of weights would take; leaves the prediction in `folder`."""
    if (count := world_size()) > 1:
        remedy = "Start it without torchrun."
        raise ValueError(explain("dry_run", "processes", "1", count, remedy))

    def train(optim: Optim, place: Path, division: Division) -> Path:
        output = place / "model"
        quiet = replace(cfg, output=str(output), work=str(place / "work"), logger=NoLogger())
        if cfg.pretrain is not None:
            _pretrain(quiet, replace(cfg.pretrain, optim=optim), place, division)
        else:
            short = replace(quiet, uptrain=replace(cfg.uptrain, optim=optim))
            _uptrain(short, place, division)
        return output

    what = cfg.uptrain if cfg.pretrain is None else cfg.pretrain
    if cfg.debug.smoke:
        raise ValueError(explain("dry_run", "value", "false with debug=smoke", "true"))
    prediction = predict(what.optim, cfg.pieces, train)
    write_json(folder / "prediction.json", prediction)
    with Run(None) as log:
        log.say(str(prediction))


def _pretrain(cfg: TrainConfig, what: Pretrain, folder: Path, division: Division) -> None:
    if isinstance(cfg.cla, Measured):
        remedy = "Choose cla=factor2."
        raise ValueError(explain("cla", "map", "known before training", "measured", remedy))
    what = what.smoke() if cfg.debug.smoke else what
    output = folder / "model" if cfg.own_folder or cfg.debug.smoke else None
    if cfg.output:
        output = output_path(cfg.output)
    owner = cfg.cla.resolve(what.arch.layers)
    pretrain(
        what,
        _text(cfg),
        cfg.model,
        output or output_path(cfg.model.path),
        folder if cfg.debug.smoke else output_path(cfg.work),
        cfg.logger,
        cfg.overwrite,
        None if owner == tuple(range(len(owner))) else owner,
        division,
    )


def _uptrain(cfg: TrainConfig, folder: Path, division: Division) -> None:
    what = cfg.uptrain.smoke() if cfg.debug.smoke else cfg.uptrain
    work = folder if cfg.debug.smoke else output_path(cfg.work)
    output = output_path(cfg.output) if cfg.output else None
    uptrain(what, cfg.cla, _text(cfg), cfg.model, output, work, cfg.logger, cfg.overwrite, division)


def _text(cfg: TrainConfig) -> DataConfig:
    """The text; a smoke run reads the smallest."""
    if cfg.debug.smoke and isinstance(cfg.data, PydocsData):
        return replace(cfg.data, packages=())
    return cfg.data


def _train_less(cfg: TrainConfig, less: LessTraining, folder: Path) -> None:
    assert cfg.codec is not None  # the configuration has a default
    if cfg.dry_run:
        with Run(None) as log:
            for line in predict_less(less, cfg.model, cfg.codec, cfg.eviction):
                log.say(line)
        return
    smoke = cfg.debug.smoke
    output = (
        folder / "less" if smoke else output_path(cfg.output or f"artifacts/less/{cfg.model.label}")
    )
    work = folder / "work" if smoke else output_path(cfg.work)
    options = less.smoke() if smoke else less
    train_less(options, cfg.model, cfg.data, cfg.codec, cfg.eviction, output, work, cfg.logger)
