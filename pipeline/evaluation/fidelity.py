"""Perplexity and divergence of a candidate against full precision, with standard errors.

Windows are paired: the difference of mean losses d is taken window by window, so what makes a
window hard cancels. Its standard error is sd(d) / sqrt(windows), and the relative change of
perplexity exp(mean d) - 1 has exp(mean d) times it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvsmith.pipeline.evaluation.forced import Losses


@dataclass(frozen=True)
class Fidelity:
    """Figures of one candidate.

    Attributes:
        windows, tokens: scored windows and tokens.
        perplexity: exp of the mean negative log-likelihood.
        delta: relative change of perplexity against full precision, 0.01 is one percent.
        delta_se: its standard error; None with one window.
        kld: mean divergence from full precision a token, nats.
        kld_se: its standard error over windows.
        kld_999: the divergence that 99.9 percent of tokens stay below, nats.
        top1: share of tokens whose most likely next token is that of full precision.
        window_nll: mean negative log-likelihood of each window, for paired comparisons between
            candidates.
    """

    windows: int
    tokens: int
    perplexity: float
    delta: float
    delta_se: float | None
    kld: float
    kld_se: float | None
    kld_999: float
    top1: float
    window_nll: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """A mean, such as that of paired differences of losses.

    Attributes:
        mean: of all values.
        se: standard error of the mean; None with one value.
    """

    mean: float
    se: float | None


def paired(first: tuple[float, ...], second: tuple[float, ...]) -> Difference:
    """The difference of two candidates' `window_nll` over the same windows."""
    return spread([a - b for a, b in zip(first, second, strict=True)])


def spread(values: Sequence[float]) -> Difference:
    """Mean of `values` and its standard error."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Difference(mean, None)
    variance = math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1)
    return Difference(mean, math.sqrt(variance / len(values)))


def summarise(candidate: Losses, full: Losses) -> Fidelity:
    """Turn losses into figures.

    Args:
        candidate: losses of the candidate.
        full: losses of full precision on the same windows.
    """
    nll = tuple(candidate.nll.tolist())
    d = paired(nll, tuple(full.nll.tolist()))
    kld = candidate.kld.double()
    return Fidelity(
        windows=kld.shape[0],
        tokens=kld.numel(),
        perplexity=math.exp(math.fsum(nll) / len(nll)),
        delta=math.expm1(d.mean),
        delta_se=None if d.se is None else math.exp(d.mean) * d.se,
        kld=float(kld.mean()),
        kld_se=paired(tuple(kld.mean(1).tolist()), (0.0,) * kld.shape[0]).se,
        kld_999=quantile(kld.flatten(), 0.999),
        top1=float(candidate.same.mean()),
        window_nll=nll,
    )


def quantile(values: torch.Tensor, share: float) -> float:
    """The smallest of `values` [n] that at least `share` of them do not exceed.

    torch.quantile takes at most 16M values.
    """
    rank = max(1, math.ceil(share * values.numel() - 1e-9))
    return float(values.kthvalue(rank).values)
