"""`train.py`: decides by the experiment what is trained. Today that is a model from scratch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from kvsmith.errors import explain
from kvsmith.pipeline.config import DebugConfig, experiments, output_path
from kvsmith.pipeline.data import DataConfig, PydocsData
from kvsmith.pipeline.log import LoggerConfig
from kvsmith.pipeline.model import ModelConfig
from kvsmith.pipeline.training.pretrain import Pretrain, pretrain


@dataclass(frozen=True)
class TrainConfig:
    """One training run; `conf/train.yaml`.

    Args:
        model: names the result and the device.
        data: text.
        pretrain: set by `experiment=pretrain_*`.
        output: model folder to write; None is `model.path`.
        work: folder of unfinished runs.
        overwrite: replace a finished model of another configuration.
        logger: where scalars go.
        debug: `debug=smoke` trains a toy for seconds.
    """

    model: ModelConfig
    data: DataConfig
    logger: LoggerConfig
    debug: DebugConfig
    pretrain: Pretrain | None = None
    output: str | None = None
    work: str = "runs/pretrain"
    overwrite: bool = False


def run(cfg: TrainConfig, folder: Path) -> None:
    """Do the training that the experiment describes.

    Args:
        cfg: the configuration.
        folder: this start's own folder; holds the composed configuration.

    Raises:
        ValueError: no experiment was chosen, or the training refuses.
    """
    if cfg.pretrain is None:
        names = ", ".join(f"experiment={name}" for name in experiments("pretrain"))
        raise ValueError(explain("train", "experiment", f"chosen: {names}", "none"))
    model, logger = cfg.model, cfg.logger
    if cfg.debug.smoke:
        data = replace(cfg.data, packages=()) if isinstance(cfg.data, PydocsData) else cfg.data
        output = output_path(cfg.output) if cfg.output else folder / "model"
        pretrain(cfg.pretrain.smoke(), data, model, output, folder, logger, cfg.overwrite)
    else:
        output, work = output_path(cfg.output or model.path), output_path(cfg.work)
        pretrain(cfg.pretrain, cfg.data, model, output, work, logger, cfg.overwrite)
