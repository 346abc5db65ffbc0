"""How long and how fast a model is trained: tokens, sequence lengths, learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from kvsmith.errors import explain


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
        lr: peak learning rate, reached after `warmup_steps`, falling along a cosine to `final_lr`
            times it.
        weight_decay: on matrices only.
        betas: of AdamW.
        grad_clip: largest norm of the whole gradient.
        dropout: share of zeros on the residual stream's inputs.
        precision: autocast; master weights are float32 either way.
        compile: torch.compile; needs a C++ compiler on a CPU.
        checkpoint_steps, eval_steps: how often; both also at the end.
        eval_windows: held-out windows for the running measure. They have the context's length: as
            long as training sequences are shorter, it shows what lies beyond them as well.
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
        for name in (
            "tokens",
            "batch_tokens",
            "lr",
            "grad_clip",
            "checkpoint_steps",
            "eval_steps",
            "eval_windows",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(
                    explain(f"{where}.{name}", "value", "positive", getattr(self, name))
                )
        if not self.phases or abs(sum(phase.share for phase in self.phases) - 1) > 1e-6:
            shares = [phase.share for phase in self.phases]
            raise ValueError(
                explain(f"{where}.phases", "shares", "at least one, with sum 1", shares)
            )
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
        return self.lr * (
            self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * place))
        )
