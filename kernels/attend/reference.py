"""Definition of attend in plain torch, accumulated in float32 (float64 for float64 inputs)."""

from __future__ import annotations

import torch

from kvsmith.kernels.low_rank.api import LowRankTerm, low_rank_logits, low_rank_values
from kvsmith.kernels.mask import masked
from kvsmith.kernels.partial import Partial


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
    B, Hq, T, D = q.shape
    H, C = k.shape[1], k.shape[2]
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(high).reshape(B, H, Hq // H * T, D) * scale
    logits = grouped @ k.to(high).transpose(-1, -2)  # [B, H, G * T, C]
    if k_low is not None:
        logits += low_rank_logits(grouped, *k_low)[..., :C]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = masked(logits.view(B, Hq, T, C), mask).view(B, H, -1, C)
    lse = torch.logsumexp(logits, dim=-1)  # [B, H, G * T]
    anchor = lse.masked_fill(lse.isneginf(), 0.0)
    p = torch.exp(logits - anchor.unsqueeze(-1))
    out = p @ v.to(high)
    if v_low is not None:
        out += low_rank_values(p, *v_low)
    return Partial(out.view(B, Hq, T, -1), lse.view(B, Hq, T))
