"""Pretraining: text -> tokenizer -> weights -> a model folder with a card, all under the name of its configuration.

Everything unfinished lives in `runs/pretrain/<name>-<hash8>/` (tokenizer, checkpoint, metrics); the model folder appears
whole at the end. The same command continues an interrupted run and skips a finished one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from kvsmith.errors import explain
from kvsmith.pipeline.config import config_hash
from kvsmith.pipeline.data import DataConfig, load_documents, token_blocks, token_stream, tokens_hash
from kvsmith.pipeline.log import LoggerConfig, Run, peak_memory
from kvsmith.pipeline.model import ModelConfig, load_model, model_device
from kvsmith.pipeline.training.architecture import Architecture, build_model
from kvsmith.pipeline.training.attention import register
from kvsmith.pipeline.training.card import model_card
from kvsmith.pipeline.training.heldout import heldout_loss
from kvsmith.pipeline.training.loop import Optim, Phase, fit
from kvsmith.pipeline.training.tokenizer import train_tokenizer
from kvsmith.strict import to_dict

RECORD = "training.json"


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
        arch = replace(self.arch, vocab_size=384, hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp_size=64)
        phases = (Phase(0.5, 64), Phase(0.5, 128))
        optim = replace(self.optim, tokens=8192, batch_tokens=512, phases=phases, warmup_steps=2, compile=False)
        return replace(self, arch=arch, optim=replace(optim, checkpoint_steps=8, eval_steps=8, eval_windows=2))


def pretrain(
    cfg: Pretrain, data: DataConfig, model: ModelConfig, output: Path, work: Path, logger: LoggerConfig, overwrite: bool
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

    Returns:
        `output`.

    Raises:
        ValueError: `output` holds something else, the text is too short, or training failed.
    """
    identity = config_hash({"pretrain": to_dict(cfg), "data": to_dict(data)})
    folder = work / f"{model.label}-{identity}"
    if _finished(output, identity, overwrite):
        Run(None).say(f"{output} is finished (run {identity}); nothing to do")
        return output
    _trim_metrics(folder, cfg.optim)
    with Run(folder, logger, {"pretrain": cfg, "data": data}) as run:
        run.say(f"run {identity}: metrics and checkpoint in {folder}")
        tokenizer = _tokenizer(folder, cfg.arch, data)
        stream = token_stream(tokenizer, load_documents(data, "train"))
        heldout = token_blocks(tokenizer, data, "heldout", None, cfg.arch.context)
        net = build_model(cfg.arch, int(tokenizer.eos_token_id), cfg.seed).to(model_device(model))
        run.say(f"{parameters(net):,} parameters, {len(stream):,} training tokens, {cfg.optim.tokens:,} to see")
        net.set_attn_implementation(register())
        began, cpu = time.monotonic(), time.process_time()
        fit(net, stream, heldout, cfg.optim, cfg.seed, run, folder / "checkpoint.safetensors", identity)
        facts = {"last_start_seconds": time.monotonic() - began, "last_start_cpu_seconds": time.process_time() - cpu}
        facts |= {"training_tokens": len(stream), "training_tokens_sha256": tokens_hash(stream)}
        _write(output, folder, net, tokenizer, cfg, data, identity, heldout, facts)
        run.say(f"wrote {output}")
    return output


def parameters(model: torch.nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(weight.numel() for weight in model.parameters())


def _finished(output: Path, identity: str, overwrite: bool) -> bool:
    """Whether `output` is this run's result; refuses what is there otherwise."""
    if not output.exists():
        return False
    record = output / RECORD
    found = json.loads(record.read_text("utf-8"))["identity"] if record.is_file() else "something else"
    if found == identity:
        return True
    if not overwrite:
        remedy = "Give another output=..., or overwrite=true."
        raise ValueError(explain("output", str(output), f"free or of run {identity}", found, remedy))
    return False


def _tokenizer(folder: Path, arch: Architecture, data: DataConfig) -> PreTrainedTokenizerFast:
    """The run's tokenizer: kept from its first start, so that a continued run reads the same tokens."""
    target = folder / "tokenizer"
    if not target.is_dir():
        fresh = train_tokenizer(load_documents(data, "train"), arch.vocab_size, arch.context)
        if len(fresh) < arch.vocab_size:
            remedy = "Give more text or a smaller pretrain.arch.vocab_size."
            raise ValueError(explain("data", "training split", f"enough for {arch.vocab_size} tokens", len(fresh), remedy))
        temporary = folder / f".tokenizer.{os.getpid()}"
        fresh.save_pretrained(temporary)
        os.replace(temporary, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def _trim_metrics(folder: Path, optim: Optim) -> None:
    """Forget scalars after the last checkpoint step; a continued run writes them again."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.endswith("}")]
    kept = max((row["step"] for row in rows if row["step"] % optim.checkpoint_steps == 0), default=0)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= kept), "utf-8")


def _write(
    output: Path,
    folder: Path,
    net: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    cfg: Pretrain,
    data: DataConfig,
    identity: str,
    heldout: Tensor,
    facts: dict[str, Any],
) -> None:
    """Write the model folder beside its target, measure what was written, then move it into place."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    count = parameters(net)
    net.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    model, _ = load_model(ModelConfig(path=str(temporary), device="cpu"))
    loss = heldout_loss(model, heldout)
    record = {
        "identity": identity,
        "pretrain": to_dict(cfg),
        "data": to_dict(data),
        "parameters": count,
        "tokens_seen": cfg.optim.steps * cfg.optim.batch_tokens,
        "heldout": {"windows": len(heldout), "length": heldout.shape[1], "loss": loss, "perplexity": math.exp(loss)},
        "heldout_tokens_sha256": tokens_hash(heldout),
        "sample": {"prompt": cfg.prompt, "continuation": _continue(model, tokenizer, cfg.prompt)},
        "peak_memory_bytes": peak_memory(),
        "torch": torch.__version__,
        **facts,
    }
    (temporary / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", "utf-8")
    (temporary / "README.md").write_text(model_card(output.name, record), "utf-8")
    shutil.copyfile(folder / "metrics.jsonl", temporary / "training_log.jsonl")
    old = output.with_name(f".{output.name}.old.{os.getpid()}")
    if output.exists():
        os.replace(output, old)
    os.replace(temporary, output)
    shutil.rmtree(old, ignore_errors=True)


def _continue(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """The greedy continuation of a prompt."""
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=64, do_sample=False)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
