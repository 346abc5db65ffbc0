"""`train.py`: a model from scratch (`experiment=pretrain_*`), or LESS states (`less=...`)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from kvsmith.errors import explain
from kvsmith.eviction.policy import KeepAll
from kvsmith.pipeline.config import DebugConfig, experiments, output_path
from kvsmith.pipeline.data import DataConfig, PydocsData
from kvsmith.pipeline.less.options import EvictionChoice, LessTraining
from kvsmith.pipeline.less.run import predict, train_less
from kvsmith.pipeline.log import LoggerConfig, Run
from kvsmith.pipeline.model import ModelConfig
from kvsmith.pipeline.training.pretrain import Pretrain, pretrain
from kvsmith.spec import CodecSpec


@dataclass(frozen=True)
class TrainConfig:
    """One training run; `conf/train.yaml`.

    Args:
        model: names the result and the device.
        data: text.
        pretrain: set by `experiment=pretrain_*`.
        less: set by `less=...`, which sets the eviction too.
        codec: how kept tokens are stored while states are trained.
        eviction: what states are trained for.
        output: model folder to write, None is `model.path`; for states the folder of results, None
            is `artifacts/less/<model>`.
        work: folder of unfinished runs.
        overwrite: replace a finished model of another configuration.
        dry_run: with `less`, say what training will take, and do nothing.
        logger: where scalars go.
        debug: `debug=smoke` trains a toy for seconds.
    """

    model: ModelConfig
    data: DataConfig
    logger: LoggerConfig
    debug: DebugConfig
    pretrain: Pretrain | None = None
    less: LessTraining | None = None
    codec: CodecSpec | None = None
    eviction: EvictionChoice = field(default_factory=KeepAll)
    output: str | None = None
    work: str = "runs/train"
    overwrite: bool = False
    dry_run: bool = False


def run(cfg: TrainConfig, folder: Path) -> None:
    """Do the training that the experiment describes.

    Args:
        cfg: the configuration.
        folder: this start's own folder; holds the composed configuration.

    Raises:
        ValueError: no experiment was chosen, or the training refuses.
    """
    if cfg.less is not None:
        _train_less(cfg, cfg.less, folder)
        return
    if cfg.dry_run:
        raise ValueError(explain("dry_run", "training", "of states, less=...", "another"))
    if cfg.pretrain is None:
        names = ", ".join(f"experiment={name}" for name in experiments("pretrain"))
        raise ValueError(
            explain("train", "experiment", f"chosen: {names}; or less=h2o_budget512", "none")
        )
    model, logger = cfg.model, cfg.logger
    if cfg.debug.smoke:
        data = replace(cfg.data, packages=()) if isinstance(cfg.data, PydocsData) else cfg.data
        output = output_path(cfg.output) if cfg.output else folder / "model"
        pretrain(cfg.pretrain.smoke(), data, model, output, folder, logger, cfg.overwrite)
    else:
        output, work = output_path(cfg.output or model.path), output_path(cfg.work)
        pretrain(cfg.pretrain, cfg.data, model, output, work, logger, cfg.overwrite)


def _train_less(cfg: TrainConfig, less: LessTraining, folder: Path) -> None:
    if cfg.pretrain is not None:
        raise ValueError(explain("train", "less", "left out with experiment", "both", "Train one."))
    assert cfg.codec is not None  # the configuration has a default
    if cfg.dry_run:
        with Run(None) as log:
            for line in predict(less, cfg.model, cfg.codec, cfg.eviction):
                log.say(line)
        return
    smoke = cfg.debug.smoke
    output = (
        folder / "less" if smoke else output_path(cfg.output or f"artifacts/less/{cfg.model.label}")
    )
    work = folder / "work" if smoke else output_path(cfg.work)
    options = less.smoke() if smoke else less
    train_less(options, cfg.model, cfg.data, cfg.codec, cfg.eviction, output, work, cfg.logger)
