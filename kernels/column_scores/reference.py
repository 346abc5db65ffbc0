"""Definition of column_scores in plain torch, some queries at a time."""

from __future__ import annotations

import torch

from kvsmith.kernels.mask import masked

# Logits held at once.
LOGIT_ELEMENTS = 1 << 23


def column_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """See `api.column_scores`."""
    B, Hq, T, _ = q.shape
    H, C = k.shape[1], k.shape[2]
    keys = k.float().transpose(-1, -2)
    # A query without a visible token has lse = -inf; +inf makes all of its probabilities 0.
    anchor = lse.float().masked_fill(lse.isneginf(), float("inf"))
    total = k.new_zeros((B, H, C), dtype=torch.float32)
    step = max(1, LOGIT_ELEMENTS // max(B * Hq * C, 1))
    for start in range(0, T, step):
        rows = slice(start, min(start + step, T))
        size = rows.stop - rows.start
        grouped = q[:, :, rows].float().reshape(B, H, Hq // H * size, -1) * scale
        logits = (grouped @ keys).view(B, Hq, size, C)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if mask is not None:
            seen = mask if mask.shape[2] == 1 else mask[:, :, rows]
            logits = masked(logits, seen)
        weights = torch.exp(logits - anchor[:, :, rows, None])
        total += weights.view(B, H, -1, C).sum(2)
    return total
