"""Masks of attention: booleans, or numbers that are added to the logits (ALiBi)."""

from __future__ import annotations

import torch


def masked(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits with -inf where nothing is seen.

    Args:
        logits: [..., C] float.
        mask: broadcasts to them; bool, true where a query sees a token, or float to be added.
    """
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, float("-inf"))
    return logits + mask
