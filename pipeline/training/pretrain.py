"""Pretraining: text -> tokenizer -> weights -> a model folder with a card.

Everything unfinished lives in `runs/train/<name>-<hash8>/` (tokenizer, checkpoint, metrics); the
model folder appears whole at the end. The same command continues an interrupted run and skips a
finished one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvsmith.errors import explain
from kvsmith.hf import geometry, share
from kvsmith.pipeline.config import config_hash
from kvsmith.pipeline.data import (
    DataConfig,
    load_documents,
    token_blocks,
    token_stream,
    tokens_hash,
)
from kvsmith.pipeline.log import LoggerConfig, Run
from kvsmith.pipeline.model import ModelConfig, model_device
from kvsmith.pipeline.training.architecture import Architecture, build_model
from kvsmith.pipeline.training.attention import register
from kvsmith.pipeline.training.division import Division
from kvsmith.pipeline.training.loop import fit
from kvsmith.pipeline.training.plan import Optim, Phase
from kvsmith.pipeline.training.result import is_finished, write_result
from kvsmith.pipeline.training.sharding import gathered
from kvsmith.pipeline.training.tokenizer import train_tokenizer
from kvsmith.pipeline.training.unread import freeze_unread, skip_unread
from kvsmith.strict import to_dict


@dataclass(frozen=True)
class Pretrain:
    """What is trained from scratch.

    Args:
        arch: sizes of the model.
        optim: length and speed of training.
        seed: of initial weights, data order and dropout.
        prompt: the card shows its greedy continuation.
    """

    arch: Architecture
    optim: Optim
    seed: int = 0
    prompt: str = "Return a new list containing"

    def __post_init__(self) -> None:
        longest = max(phase.length for phase in self.optim.phases)
        if longest > self.arch.context:
            expected = f"at most pretrain.arch.context ({self.arch.context})"
            raise ValueError(explain("pretrain.optim.phases", "length", expected, longest))

    def smoke(self) -> Pretrain:
        """The same path in seconds: a toy of two layers, a few steps."""
        arch = replace(
            self.arch,
            vocab_size=384,
            hidden_size=32,
            layers=2,
            heads=2,
            kv_heads=1,
            head_dim=16,
            mlp_size=64,
        )
        phases = (Phase(0.5, 64), Phase(0.5, 128))
        optim = replace(
            self.optim, tokens=8192, batch_tokens=512, phases=phases, warmup_steps=2, compile=False
        )
        return replace(
            self, arch=arch, optim=replace(optim, checkpoint_steps=8, eval_steps=8, eval_windows=2)
        )


def pretrain(
    cfg: Pretrain,
    data: DataConfig,
    model: ModelConfig,
    output: Path,
    work: Path,
    logger: LoggerConfig,
    overwrite: bool,
    owner: tuple[int, ...] | None = None,
    division: Division | None = None,
) -> Path:
    """Train a model and write its folder.

    Args:
        cfg: what to train.
        data: text; the train split trains, the heldout split measures.
        model: device, and the name of the result.
        output: model folder to write.
        work: folder of unfinished runs.
        logger: where scalars go besides the run's files.
        overwrite: replace a finished model of another configuration.
        owner: for each layer the layer whose keys and values it reads; None is itself.
        division: of the work among processes, which all call this.

    Returns:
        `output`.

    Raises:
        ValueError: `output` holds something else, the text is too short, or training failed.
    """
    shared = {} if owner is None else {"owner": list(owner)}
    identity = config_hash({"pretrain": to_dict(cfg), "data": to_dict(data), **shared})
    division = division or Division()
    lead = division.workers.leads
    if is_finished(output, identity, overwrite):
        Run(None, quiet=not lead).say(f"{output} is finished (run {identity}); nothing to do")
        return output
    folder = work / f"{model.label}-{identity}"
    config = {"pretrain": to_dict(cfg), "data": to_dict(data)}
    with division.voice(folder, logger, config) as run:
        run.say(f"run {identity}: metrics and checkpoint in {folder}")
        if lead:
            _tokenizer(folder, cfg.arch, data)
        division.workers.wait()
        tokenizer = _tokenizer(folder, cfg.arch, data)
        stream = token_stream(tokenizer, load_documents(data, "train"))
        heldout = token_blocks(tokenizer, data, "heldout", None, cfg.arch.context)
        net = build_model(cfg.arch, int(tokenizer.eos_token_id), cfg.seed)
        net.to(model_device(model)).set_attn_implementation(register())
        if owner is not None:
            share(net, owner)
            freeze_unread(net, owner)
            skip_unread(net, owner)
        run.say(f"{parameters(net):,} parameters, {len(stream):,} training tokens")
        checkpoint = folder / "checkpoint.safetensors"
        done = fit(
            net,
            stream,
            heldout,
            cfg.optim,
            cfg.seed,
            run,
            checkpoint,
            identity,
            division=division,
        )
        net = gathered(net)
        if not lead:
            return output
        record = {
            "identity": identity,
            "pretrain": to_dict(cfg),
            "data": to_dict(data),
            "parameters": parameters(net),
            "kv_bytes_per_token": 2 * geometry(net.config).elements,
            **shared,
            "training_tokens": len(stream),
            "training_tokens_sha256": tokens_hash(stream),
            "tokens_seen": done.steps * cfg.optim.batch_tokens,
            "training_seconds": round(done.seconds),
            "training_cpu_seconds": round(done.cpu_seconds),
        }
        write_result(output, net, tokenizer, heldout, cfg.prompt, record, folder / "metrics.jsonl")
        run.say(f"wrote {output}")
    return output


def parameters(model: torch.nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(weight.numel() for weight in model.parameters())


def _tokenizer(folder: Path, arch: Architecture, data: DataConfig) -> PreTrainedTokenizerFast:
    """The run's tokenizer, kept from its first start: a continued run reads the same tokens."""
    target = folder / "tokenizer"
    if not target.is_dir():
        fresh = train_tokenizer(load_documents(data, "train"), arch.vocab_size, arch.context)
        if len(fresh) < arch.vocab_size:
            remedy = "Give more text or a smaller pretrain.arch.vocab_size."
            raise ValueError(
                explain(
                    "data",
                    "training split",
                    f"enough for {arch.vocab_size} tokens",
                    len(fresh),
                    remedy,
                )
            )
        temporary = folder / f".tokenizer.{os.getpid()}"
        fresh.save_pretrained(temporary)
        os.replace(temporary, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer
