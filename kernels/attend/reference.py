"""Definition of attend in plain torch, accumulated in float32 (float64 for float64 inputs)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvsmith.kernels.low_rank.api import LowRankTerm, low_rank_logits, low_rank_values
from kvsmith.kernels.mask import masked
from kvsmith.kernels.partial import Partial

if TYPE_CHECKING:
    from kvsmith.kernels.attend.api import Part


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    softcap: float | None,
    k_low: LowRankTerm | None = None,
    v_low: LowRankTerm | None = None,
) -> Partial:
    """See `api.attend`."""
    p, lse = _softmax(_logits(q, k, scale, mask, softcap, k_low), q.shape[:3])
    out = p @ v.to(p.dtype)
    if v_low is not None:
        out += low_rank_values(p, *v_low)
    return Partial(out.view(*q.shape[:3], -1), lse)


def attend_parts(
    parts: Sequence[Part], scale: float, softcap: float | None
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """See `api.attend_parts`."""
    shape = parts[0].q.shape[:3]
    logits = [_logits(x.q, x.k, scale, x.mask, softcap) for x in parts]
    p, lse = _softmax(torch.cat(logits, -1), shape)
    each = p.split([x.k.shape[2] for x in parts], -1)
    outs = [w @ x.v.to(w.dtype) for w, x in zip(each, parts, strict=True)]
    return [x.view(*shape, -1) for x in outs], lse, p.view(*shape, -1)


def _logits(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    softcap: float | None,
    k_low: LowRankTerm | None = None,
) -> torch.Tensor:
    """[B, H, G * T, C], -inf where nothing is seen."""
    (B, Hq, T, D), (H, C) = q.shape, k.shape[1:3]
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(high).reshape(B, H, Hq // H * T, D) * scale
    logits = grouped @ k.to(high).transpose(-1, -2)
    if k_low is not None:
        logits += low_rank_logits(grouped, *k_low)[..., :C]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = masked(logits.view(B, Hq, T, C), mask).view(B, H, -1, C)
    return logits


def _softmax(logits: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [B, H, G * T, C], and lse of the queries `shape` [B, Hq, T]."""
    lse = torch.logsumexp(logits, dim=-1)
    anchor = lse.masked_fill(lse.isneginf(), 0.0)
    return torch.exp(logits - anchor.unsqueeze(-1)), lse.view(shape)
