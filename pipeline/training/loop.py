"""The training loop: AdamW, warm-up and cosine, gradient clipping, autocast; exact continuation after any interruption."""

from __future__ import annotations

import ctypes
import math
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import LlamaForCausalLM

from kvsmith.errors import explain
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.training.checkpoint import load_checkpoint, save_checkpoint
from kvsmith.pipeline.training.dropout import Dropout
from kvsmith.pipeline.training.heldout import heldout_loss
from kvsmith.pipeline.training.windows import Windows

# <malloc.h> of glibc
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


@dataclass(frozen=True)
class Phase:
    """A part of training with one sequence length.

    Args:
        share: of all tokens, in (0, 1]; the shares of all phases sum to 1.
        length: tokens in a sequence.
    """

    share: float
    length: int


@dataclass(frozen=True)
class Optim:
    """How long and how fast.

    Args:
        tokens: tokens seen in all; rounded up to whole steps.
        batch_tokens: tokens in a step, a multiple of every phase's length.
        phases: sequence lengths in order.
        lr: peak learning rate, reached after `warmup_steps`, falling along a cosine to `final_lr` times it.
        weight_decay: on matrices only.
        betas: of AdamW.
        grad_clip: largest norm of the whole gradient.
        dropout: share of zeros on the residual stream's inputs.
        precision: autocast; master weights are float32 either way.
        compile: torch.compile; needs a C++ compiler on a CPU.
        checkpoint_steps, eval_steps: how often; both also at the end.
        eval_windows: held-out windows of the context's length for the running measure.
    """

    tokens: int
    batch_tokens: int
    phases: tuple[Phase, ...]
    lr: float
    warmup_steps: int
    final_lr: float = 0.05
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    dropout: float = 0.0
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    compile: bool = True
    checkpoint_steps: int = 200
    eval_steps: int = 200
    eval_windows: int = 8

    def __post_init__(self) -> None:
        where = "pretrain.optim"
        for name in ("tokens", "batch_tokens", "lr", "grad_clip", "checkpoint_steps", "eval_steps", "eval_windows"):
            if getattr(self, name) <= 0:
                raise ValueError(explain(f"{where}.{name}", "value", "positive", getattr(self, name)))
        if not self.phases or abs(sum(phase.share for phase in self.phases) - 1) > 1e-6:
            shares = [phase.share for phase in self.phases]
            raise ValueError(explain(f"{where}.phases", "shares", "at least one, with sum 1", shares))
        for phase in self.phases:
            if phase.length <= 0 or self.batch_tokens % phase.length:
                expected = f"a divisor of batch_tokens ({self.batch_tokens})"
                raise ValueError(explain(f"{where}.phases", "length", expected, phase.length))
        if not 0 <= self.dropout < 1:
            raise ValueError(explain(f"{where}.dropout", "value", "in [0, 1)", self.dropout))

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return math.ceil(self.tokens / self.batch_tokens)

    def length_at(self, step: int) -> int:
        """Sequence length of a step."""
        done = 0.0
        for phase in self.phases:
            done += phase.share
            if step < round(done * self.steps):
                return phase.length
        return self.phases[-1].length

    def lr_at(self, step: int) -> float:
        """Learning rate of a step."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        place = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * place)))


def fit(
    model: LlamaForCausalLM, stream: Tensor, heldout: Tensor, cfg: Optim, seed: int, run: Run, checkpoint: Path, identity: str
) -> None:
    """Train `model` in place from its checkpoint, or from the start, to the last step.

    Args:
        model: float32 master weights, on the device to train on.
        stream: [tokens] int64, the training split.
        heldout: [N, context] int64 windows for the running measure.
        cfg: see `Optim`.
        seed: of data order and dropout.
        run: gets scalars `loss`, `lr`, `grad_norm`, `heldout_loss`.
        checkpoint: file to continue from and to write.
        identity: hash of the configuration; a checkpoint of another run is refused.

    Raises:
        ValueError: the loss is not finite, the checkpoint does not fit, or the text is too short.
        SystemExit: 143 after SIGTERM, with the checkpoint written.
    """
    _keep_freed_memory()
    optimizer = _optimizer(model, cfg)
    begin = load_checkpoint(checkpoint, model, optimizer, identity)
    if begin:
        run.say(f"continuing at step {begin} of {cfg.steps} from {checkpoint}")
    step_fn = _Step(model, optimizer, stream, cfg, seed)
    tokens = cfg.batch_tokens
    with _signals() as caught, run.progress(cfg.steps * tokens, "tokens", start=begin * tokens) as progress:
        for step in range(begin, cfg.steps):
            values = step_fn(step)
            done = step + 1
            if done % cfg.eval_steps == 0 or done == cfg.steps:
                with _autocast(model, cfg):
                    values["heldout_loss"] = heldout_loss(model, heldout[: cfg.eval_windows])
            if done % 10 == 0 or len(values) > 3:
                run.scalars(done, {"tokens": done * tokens, **values})
            if done % cfg.checkpoint_steps == 0 or done == cfg.steps or caught:
                save_checkpoint(checkpoint, model, optimizer, done, identity)
            progress.advance(tokens, **{name: value for name, value in values.items() if "loss" in name})
            if caught:
                run.say(f"stopped by a signal after step {done}; the same command continues")
                raise SystemExit(128 + caught[0])
    step_fn.dropout.remove()


class _Step:
    """One optimizer step as a function of its number."""

    def __init__(self, model: LlamaForCausalLM, optimizer: AdamW, stream: Tensor, cfg: Optim, seed: int) -> None:
        self._model, self._optimizer, self._cfg = model, optimizer, cfg
        self._windows = {
            phase.length: Windows(stream, phase.length, cfg.batch_tokens // phase.length, seed) for phase in cfg.phases
        }
        self.dropout = Dropout(model, cfg.dropout, seed, torch.bfloat16 if cfg.precision == "bfloat16" else torch.float32)
        self._loss = _loss_function(model, cfg)

    def __call__(self, step: int) -> dict[str, float]:
        length, lr = self._cfg.length_at(step), self._cfg.lr_at(step)
        batch = self._windows[length].batch(step).to(self._model.device)
        self.dropout.draw(batch.shape[0], length, step)
        loss = self._loss(batch[:, :-1], batch[:, 1:])
        value = loss.item()
        if not math.isfinite(value):
            remedy = "Lower pretrain.optim.lr; the last checkpoint is kept."
            raise ValueError(explain("training", f"loss at step {step + 1}", "finite", value, remedy))
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self._model.parameters(), self._cfg.grad_clip))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        return {"loss": value, "lr": lr, "grad_norm": norm}


def _loss_function(model: LlamaForCausalLM, cfg: Optim) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with _autocast(model, cfg):
            hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    if not cfg.compile:
        return loss
    if model.device.type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        remedy = "Install g++, or set pretrain.optim.compile=false."
        raise ValueError(explain("pretrain.optim.compile", "C++ compiler", "on the path", "none", remedy))
    compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(loss, dynamic=False)
    return compiled


def _autocast(model: LlamaForCausalLM, cfg: Optim) -> torch.autocast:
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=cfg.precision == "bfloat16")


def _optimizer(model: nn.Module, cfg: Optim) -> AdamW:
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": cfg.weight_decay},
        {"params": [w for w in weights if w.dim() <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True)


def _keep_freed_memory() -> None:
    """Tell glibc not to return freed memory: page faults on fresh activations cost an eighth of a CPU step."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in every libc
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying, so that the step in hand is finished and kept."""
    caught: list[int] = []
    names = (signal.SIGTERM, signal.SIGINT)
    before = {name: signal.signal(name, lambda number, _: caught.append(number)) for name in names}
    try:
        yield caught
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
