"""train.py less=...: from the configuration to trained states in `artifacts/less/<model>/<hash8>`.

Unfinished runs lie in `runs/less`; the same command continues one, and skips a finished one.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvsmith.bundle import expected_tensors
from kvsmith.errors import explain
from kvsmith.eviction.policy import KeepAll
from kvsmith.hf.geometry import geometry
from kvsmith.hf.shapes import SHAPES, model_facts, shape_config
from kvsmith.layout import check_geometry, evicting_layers
from kvsmith.pipeline.calibration import describe_model, find_calibration, parameters_for
from kvsmith.pipeline.config import input_path, output_path
from kvsmith.pipeline.data import DataConfig, data_name, token_blocks, tokens_hash
from kvsmith.pipeline.less.estimate import estimate
from kvsmith.pipeline.less.joint import Joint
from kvsmith.pipeline.less.options import EvictionChoice, LessTraining, context_of, resolve
from kvsmith.pipeline.less.result import RECORD, Source, write_trained
from kvsmith.pipeline.less.training import Training
from kvsmith.pipeline.log import LoggerConfig, Run
from kvsmith.pipeline.model import ModelConfig, load_config, load_model
from kvsmith.pipeline.stage import Stop, digest, locked
from kvsmith.pipeline.workers import start_workers
from kvsmith.spec import CacheSpec, CodecSpec

LONGEST = 4096  # tokens of a sequence where the configuration names none


def train_less(
    cfg: LessTraining,
    model_cfg: ModelConfig,
    data: DataConfig,
    codec: CodecSpec,
    choice: EvictionChoice,
    output: Path,
    work: Path,
    logger: LoggerConfig,
) -> Path | None:
    """Train the states of all layers.

    Args:
        cfg: how.
        model_cfg: the model; several processes share its devices among them.
        data: the train split trains, the calibration split measures.
        codec: how kept tokens are stored, quantized or not.
        choice: the eviction.
        output: folder of a model's results.
        work: folder of unfinished runs.
        logger: where scalars go besides the run's files.

    Returns:
        Folder of the result; None in processes that do not lead.

    Raises:
        FileNotFoundError, ValueError: what the user got wrong, in one line.
        SystemExit: 143 after SIGTERM; the same call then continues.
    """
    workers = start_workers(model_cfg)
    output, work = (Path(workers.leaders(str(path))) for path in (output, work))
    model, tokenizer = load_model(model_cfg)
    model.requires_grad_(False)
    spec = cache_spec(codec, choice, model.config)
    shape = geometry(model.config)
    if cfg.joint_steps and len(shape.owners) < len(shape.layers):
        expected = "0 for a model whose layers share"
        raise ValueError(explain("less.joint_steps", "value", expected, cfg.joint_steps))
    tokens, held = texts(cfg, data, model, tokenizer)
    source = describe(cfg, model_cfg, data, model, spec, tokens, held)
    name = digest(source)[:8]
    folder = output / name
    if (folder / RECORD).is_file():
        Run(None, quiet=not workers.leads).say(f"{folder} is finished; nothing to do")
        return folder
    unfinished = work / f"{model_cfg.label}-{name}"
    lead = workers.leads
    told = Run(unfinished, logger, source) if lead else Run(None, quiet=True)
    with told as log, Stop() as stop, locked(unfinished) if lead else nullcontext():
        own = workers.in_turn(lambda: codec_parameters(codec, model_cfg, model, spec, log), stop)
        training = Training(model, spec, own, cfg, tokens, held, unfinished, workers, log, stop)
        clock, processor = time.monotonic(), time.process_time()
        training.run()
        if cfg.joint_steps:
            Joint(training).run()
        left, error = training.measure()
        ranks = training.ranks(left, error)
        tensors = training.tensors()
        if not lead:
            return None
        write_trained(folder, source, left, error, ranks, tensors)
        report(log, left, error, ranks)
        took = time.monotonic() - clock, time.process_time() - processor
        log.say(f"trained and measured in {took[0]:.0f} s, {took[1]:.0f} s of the processor")
        log.say(f"written: {folder}")
    return folder


def predict(
    cfg: LessTraining, model_cfg: ModelConfig, codec: CodecSpec, choice: EvictionChoice
) -> list[str]:
    """What a training would take, by arithmetic; nothing is loaded. Raises as `cache_spec`.

    Models of the hub that are known by name need no network.
    """
    known = model_cfg.label in SHAPES and not input_path(model_cfg.path).is_dir()
    config = shape_config(model_cfg.label) if known else load_config(model_cfg)
    spec = cache_spec(codec, choice, config)
    context = context_of(config)
    length = cfg.length or min(context or LONGEST, LONGEST)
    return estimate(model_facts(model_cfg.label, config), spec, cfg, length)


def cache_spec(codec: CodecSpec, choice: EvictionChoice, config: PreTrainedConfig) -> CacheSpec:
    """The cache that is trained for.

    Raises:
        ValueError: nothing is evicted, or the eviction does not fit model or codec.
    """
    if isinstance(choice, KeepAll):
        remedy = "Choose eviction=h2o_pct5, say; less=h2o_pct5 brings its own."
        raise ValueError(explain("less", "eviction", "one that evicts", "keep_all", remedy))
    spec = CacheSpec(codec, resolve(choice, context_of(config)))
    shape = geometry(config)
    check_geometry(spec, shape)
    if not evicting_layers(spec, shape):
        expected = "one with layers without a sliding window"
        raise ValueError(explain("less", "model", expected, "none"))
    return spec


def texts(
    cfg: LessTraining, data: DataConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor]:
    """Sequences that train, and sequences that measure."""
    context = context_of(model.config)
    length = cfg.length or min(context or LONGEST, LONGEST)
    if context is not None and length > context:
        expected = f"at most the model's context of {context}"
        raise ValueError(explain("less.length", "tokens of a sequence", expected, length))
    tokens = token_blocks(tokenizer, data, "train", cfg.samples, length, seed=cfg.seed)
    held = token_blocks(tokenizer, data, "calibration", cfg.held, length, seed=cfg.seed)
    return tokens, held


def describe(
    cfg: LessTraining,
    model_cfg: ModelConfig,
    data: DataConfig,
    model: PreTrainedModel,
    spec: CacheSpec,
    tokens: Tensor,
    held: Tensor,
) -> Source:
    """Everything that the features will depend on."""
    base, weights = describe_model(model_cfg, model)
    return Source(
        base_model=base,
        weights_hash=weights,
        dtype=str(model.dtype).removeprefix("torch."),
        dataset=data_name(data),
        tokens_hash=tokens_hash(torch.cat([tokens.flatten(), held.flatten()])),
        length=tokens.shape[1],
        cache=spec,
        training=cfg,
    )


def codec_parameters(
    codec: CodecSpec, model_cfg: ModelConfig, model: PreTrainedModel, spec: CacheSpec, log: Run
) -> dict[str, Tensor]:
    """Codebooks and ranges of the newest calibration, where the codec has any."""
    if not expected_tensors(spec, geometry(model.config)):
        return {}
    root = output_path("artifacts/calibration")
    folder = find_calibration(root, model_cfg, model, codec)
    return parameters_for(folder, codec, log)


def report(
    log: Run,
    left: dict[int, dict[int, float]],
    error: dict[int, float],
    ranks: tuple[int, ...],
) -> None:
    """A table: what eviction costs each layer, and how much of it each rank removes."""
    trained = sorted(next(iter(left.values())))
    rows = [
        (i, f"{error[i]:.3g}", *(f"{100 * (1 - by[r]):.1f}" for r in trained), rank)
        for (i, by), rank in zip(left.items(), ranks, strict=True)
    ]
    columns = ("layer", "error", *(f"R={r}: % removed" for r in trained), "allotted")
    log.table("Error of attention under eviction, and what the state removes", columns, rows)
