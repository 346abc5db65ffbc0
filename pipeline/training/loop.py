"""The training loop; it continues exactly after any interruption."""

from __future__ import annotations

import ctypes
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import LlamaForCausalLM

from kvsmith.errors import explain
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.training.checkpoint import Done, load_checkpoint, save_checkpoint
from kvsmith.pipeline.training.division import Division
from kvsmith.pipeline.training.dropout import Dropout
from kvsmith.pipeline.training.heldout import heldout_loss
from kvsmith.pipeline.training.plan import Optim
from kvsmith.pipeline.training.sharding import spread_again, whole
from kvsmith.pipeline.training.windows import Windows

# <malloc.h> of glibc
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4

LOG_STEPS = 10
Loss = Callable[[Tensor, Tensor], Tensor]


def fit(
    model: LlamaForCausalLM,
    stream: Tensor,
    heldout: Tensor,
    cfg: Optim,
    seed: int,
    run: Run,
    checkpoint: Path,
    identity: str,
    loss: Loss | None = None,
    before_step: Callable[[int], None] = lambda _: None,
    division: Division | None = None,
) -> Done:
    """Train `model` in place from its checkpoint, or from the start, to the last step.

    Args:
        model: float32 master weights, on the device to train on.
        stream: [tokens] int64, the training split.
        heldout: [N, context] int64 windows for the running measure.
        cfg: see `Optim`.
        seed: of data order and dropout.
        run: gets scalars `tokens`, `loss`, `lr`, `grad_norm`, and `heldout_loss` now and then.
        checkpoint: file to continue from and to write.
        identity: hash of the configuration; a checkpoint of another run is refused.
        loss: of inputs and targets [B, T]; None is cross-entropy.
        before_step: called with the number of each step, from 0.
        division: among processes, which all call this; None is one process and one piece.

    Returns:
        Steps and time over all starts.

    Raises:
        ValueError: the loss is not finite, the checkpoint does not fit, or the text is too short.
        SystemExit: 143 after SIGTERM and 130 after Ctrl-C, with the checkpoint written.
    """
    _keep_freed_memory()
    division = division or Division()
    division.shard(model)
    if division.sharded:
        run.say(f"FSDP2 spreads {division.sharding} over {division.workers.count} processes")
    optimizer = _optimizer(model, cfg)
    before = load_checkpoint(checkpoint, model, optimizer, identity)
    if before.steps:
        run.say(f"continuing at step {before.steps} of {cfg.steps} from {checkpoint}")
        run.rewind(before.steps)
    clock = _Clock(before)
    one_step = _Step(model, optimizer, stream, cfg, seed, loss, division)
    total, tokens = cfg.steps * cfg.batch_tokens, cfg.batch_tokens
    with _signals() as caught, run.progress(total, "tokens", before.steps * tokens) as progress:
        for done in range(before.steps + 1, cfg.steps + 1):
            before_step(done - 1)
            values = one_step(done - 1)
            if done % cfg.eval_steps == 0 or done == cfg.steps:
                with _autocast(model, cfg):
                    values["heldout_loss"] = heldout_loss(model, heldout[: cfg.eval_windows])
                spread_again(model)
            if done % LOG_STEPS == 0 or "heldout_loss" in values:
                run.scalars(done, {"tokens": done * tokens, **values})
            stopped = division.any(bool(caught))
            due = done % cfg.checkpoint_steps == 0 or done == cfg.steps or stopped
            if due and (division.sharded or division.workers.leads):
                path = checkpoint if division.workers.leads else None
                save_checkpoint(path, model, optimizer, clock.at(done), identity)
            progress.advance(tokens, **{k: v for k, v in values.items() if "loss" in k})
            if stopped:
                division.workers.wait()  # for the checkpoint
                run.say(f"stopped by a signal after step {done}; the same command continues")
                raise SystemExit(128 + (caught or [signal.SIGTERM])[0])
    one_step.dropout.remove()
    return clock.at(cfg.steps)


class _Clock:
    """Wall and processor time of this start, added to that of the starts before."""

    def __init__(self, before: Done) -> None:
        self._before = before
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def at(self, steps: int) -> Done:
        return Done(
            steps,
            self._before.seconds + time.monotonic() - self._wall,
            self._before.cpu_seconds + time.process_time() - self._cpu,
        )


class _Step:
    """One optimizer step as a function of its number."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        optimizer: AdamW,
        stream: Tensor,
        cfg: Optim,
        seed: int,
        loss: Loss | None,
        division: Division,
    ) -> None:
        for phase in cfg.phases:
            division.check(cfg.batch_tokens // phase.length, phase.length)
        self._division = division
        self._model, self._optimizer, self._cfg = model, optimizer, cfg
        self._windows = {
            phase.length: Windows(stream, phase.length, cfg.batch_tokens // phase.length, seed)
            for phase in cfg.phases
        }
        dtype = torch.bfloat16 if cfg.precision == "bfloat16" else torch.float32
        self.dropout = Dropout(model, cfg.dropout, seed, dtype)
        self._loss = loss or _loss_function(model, cfg)

    def __call__(self, step: int) -> dict[str, float]:
        length, lr = self._cfg.length_at(step), self._cfg.lr_at(step)
        batch = self._windows[length].batch(step).to(self._model.device)
        self.dropout.draw(batch.shape[0], length, step)
        total = torch.zeros((), device=batch.device)
        for rows in self._division.rows(len(batch)):
            self.dropout.rows = rows
            loss = self._loss(batch[rows, :-1], batch[rows, 1:])
            _check_finite(loss.item(), step)
            (loss / self._division.scale).backward()
            total += loss.detach() / self._division.parts
        value = self._division.add(total, self._model.parameters())
        norm = whole(nn.utils.clip_grad_norm_(self._model.parameters(), self._cfg.grad_clip))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        return {"loss": value, "lr": lr, "grad_norm": float(norm)}


def _check_finite(value: float, step: int) -> None:
    if not math.isfinite(value):
        remedy = "Lower pretrain.optim.lr; the last checkpoint is kept."
        raise ValueError(explain("training", f"loss at step {step + 1}", "finite", value, remedy))


def _loss_function(model: LlamaForCausalLM, cfg: Optim) -> Loss:
    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with _autocast(model, cfg):
            logits = model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    if not cfg.compile:
        return loss
    if model.device.type == "cpu" and not any(
        shutil.which(name) for name in ("c++", "g++", "clang++")
    ):
        remedy = "Install g++, or set pretrain.optim.compile=false."
        raise ValueError(
            explain("pretrain.optim.compile", "C++ compiler", "on the path", "none", remedy)
        )
    compiled: Loss = torch.compile(loss, dynamic=False)
    return compiled


def _autocast(model: LlamaForCausalLM, cfg: Optim) -> torch.autocast:
    return torch.autocast(
        model.device.type, dtype=torch.bfloat16, enabled=cfg.precision == "bfloat16"
    )


def _optimizer(model: nn.Module, cfg: Optim) -> AdamW:
    weights = [w for w in model.parameters() if w.requires_grad]
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": cfg.weight_decay},
        {"params": [w for w in weights if w.dim() <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True)


def _keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: page faults would cost an eighth of a CPU step."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in every libc
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT, so that the step in hand is finished and kept."""
    caught: list[int] = []
    names = (signal.SIGTERM, signal.SIGINT)
    before = {name: signal.signal(name, lambda number, _: caught.append(number)) for name in names}
    try:
        yield caught
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
