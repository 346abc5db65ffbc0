"""Causal attention for training as plain matrix products: on a CPU faster than the fused kernel.

The queries are cut into blocks of `BLOCK`; a block meets only the keys up to its own end, so about
half of the products of the square are never made. Softmax in float32. No padding, no cache:
training windows are full.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "kvsmith_training"
BLOCK = 256


def block_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function with transformers' signature.

    Args:
        module: the attention layer; not used.
        q: [B, H * G, T, D] queries after RoPE.
        k, v: [B, H, T, D].
        mask: must be None.
        scaling: of the logits; None is 1 / sqrt(D).

    Returns:
        [B, T, H * G, D] and no attention weights.
    """
    assert mask is None and q.shape[2] == k.shape[2], "training attention takes full windows"
    batch, heads, length, dim = q.shape
    kv_heads = k.shape[1]
    q = (q * (dim**-0.5 if scaling is None else scaling)).view(
        batch, kv_heads, heads // kv_heads, length, dim
    )
    blocks = [
        _block(q[:, :, :, begin : begin + BLOCK], k, v, begin) for begin in range(0, length, BLOCK)
    ]
    return torch.cat(blocks, dim=1), None


def _block(q: Tensor, k: Tensor, v: Tensor, begin: int) -> Tensor:
    """A block of queries [B, H, G, S, D] from position `begin` on; gives [B, S, H * G, D]."""
    batch, kv_heads, groups, size, dim = q.shape
    end = begin + size
    scores = q.reshape(batch, kv_heads, groups * size, dim) @ k[:, :, :end].transpose(
        -1, -2
    )  # [B, H, G * S, T]
    position = torch.arange(end, device=q.device)
    future = position[None, :] > position[begin:, None]
    scores = (
        scores.view(batch, kv_heads, groups, size, end).float().masked_fill(future, float("-inf"))
    )
    weights = scores.softmax(-1).to(v.dtype).view(batch, kv_heads, groups * size, end)
    out = (weights @ v[:, :, :end]).view(batch, kv_heads * groups, size, dim)
    return out.transpose(1, 2)


def register() -> str:
    """Make the function known to transformers; returns the name for `attn_implementation`."""
    AttentionInterface.register(NAME, block_attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    return NAME
