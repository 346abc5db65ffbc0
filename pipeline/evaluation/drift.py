"""How errors add up while a model writes: divergence along full precision's own continuation.

Free-running texts part at the first different token, and what follows compares two texts. So the
greedy continuation of full precision is fed to the candidate token by token, through its cache, and
each prediction is compared with full precision's: what the candidate would have said had it
written that far.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsmith.pipeline.evaluation.fidelity import spread
from kvsmith.pipeline.evaluation.forced import Losses

SLICES = 16  # points of the curve, at most


@dataclass(frozen=True)
class Drift:
    """Figures of one candidate.

    Attributes:
        prompts, tokens: continuations, and generated tokens compared of each.
        kld: mean divergence from full precision a generated token, nats.
        kld_se: its standard error over prompts; None with one.
        same: share of tokens whose most likely one is that of full precision.
        upto: generated tokens at the end of each slice of the continuation.
        curve: mean divergence within each slice, nats.
    """

    prompts: int
    tokens: int
    kld: float
    kld_se: float | None
    same: float
    upto: tuple[int, ...]
    curve: tuple[float, ...]


def drift(lost: Losses) -> Drift:
    """Figures from the losses along the continuations of full precision."""
    kld = lost.kld.double()
    prompts, tokens = kld.shape
    total = spread(kld.mean(1).tolist())
    parts = kld.mean(0).tensor_split(min(SLICES, tokens))
    upto, end = [], 0
    for part in parts:
        end += part.shape[0]
        upto.append(end)
    curve = tuple(float(part.mean()) for part in parts)
    same = float(lost.same.mean())
    return Drift(prompts, tokens, total.mean, total.se, same, tuple(upto), curve)
