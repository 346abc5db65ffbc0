"""attend: grouped-query attention over dense keys and values that returns its log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvsmith.errors import explain
from kvsmith.kernels.attend import reference
from kvsmith.kernels.low_rank.api import LowRankTerm
from kvsmith.kernels.partial import Partial


@dataclass(frozen=True)
class Part:
    """A set of tokens and the queries that meet it; q, k, v and mask as in `attend`.

    Attributes:
        q: [B, H * G, T, D], channels in the order of k's.
        k: [B, H, C, D].
        v: [B, H, C, Dv].
        mask: see `attend`.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    k_low: LowRankTerm | None = None,
    v_low: LowRankTerm | None = None,
) -> Partial:
    """Attend to a set of tokens.

    Args:
        q: [B, H * G, T, D] float, queries; query head h * G + g reads KV head h.
        k: [B, H, C, D] float, keys in the queries' domain (rotated as they are).
        v: [B, H, C, Dv] float, values.
        scale: factor on the logits.
        mask: [B or 1, H * G or 1, T or 1, C] bool, true where a query sees a token, or float to add
            to the logits; None for all.
        softcap: logits become softcap * tanh(logits / softcap); None for none.
        k_low, v_low: factors (left, right) of a term that k and v lack, see `low_rank`; None for
            none.

    Returns:
        Partial with out [B, H * G, T, Dv] and lse [B, H * G, T], float32.

    Raises:
        ValueError: the shapes do not fit.
    """
    if q.shape[1] % k.shape[1] or q.shape[-1] != k.shape[-1] or k.shape[:3] != v.shape[:3]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(
            explain("attend", "shapes", "q [B, H*G, T, D], k [B, H, C, D], v [B, H, C, Dv]", shapes)
        )
    return reference.attend(q, k, v, scale, mask, softcap, k_low, v_low)


def attend_parts(
    parts: Sequence[Part], *, scale: float, softcap: float | None = None
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Attend to several sets of tokens as to one, without a copy that joins them.

    Args:
        parts: the sets; q are the same queries in all of them.
        scale, softcap: as in `attend`.

    Returns:
        outs: [B, H * G, T, Dv] float32 of each set, to be summed;
        lse: [B, H * G, T] float32 over all sets;
        weights: [B, H * G, T, C] float32, the softmax over all sets.
    """
    return reference.attend_parts(parts, scale, softcap)
