"""The first tokens of every row, kept dense: attention sinks."""

from __future__ import annotations

import torch

Pair = tuple[torch.Tensor, torch.Tensor]  # keys [B, H, T, D] and values [B, H, T, Dv]


def empty_pair(k: torch.Tensor, v: torch.Tensor, shape: tuple[int, int, int]) -> Pair:
    """Zeros [*shape, D] and [*shape, Dv] like k and v."""
    return k.new_zeros((*shape, k.shape[-1])), v.new_zeros((*shape, v.shape[-1]))


def write_sinks(sinks: Pair, new: Pair, first: int, padding: torch.Tensor | None) -> None:
    """Copy those of the new tokens that are sinks.

    Args:
        sinks: [B, H, S, D] keys and values, changed in place.
        new: [B, H, T, D] tokens of columns first, first + 1, ...
        first: column of the first new token.
        padding: [B] int64 columns of left padding; None for none.
    """
    S, T = sinks[0].shape[2], new[0].shape[2]
    if padding is None:
        stop = min(S, first + T)
        for sink, x in zip(sinks, new, strict=True):
            sink[:, :, first:stop] = x[:, :, : max(stop - first, 0)]
        return
    columns = sink_columns(padding, S) - first  # [B, S]
    rows, slots = torch.where((columns >= 0) & (columns < T))
    for sink, x in zip(sinks, new, strict=True):
        sink[rows, :, slots] = x[rows, :, columns[rows, slots]]


def sink_columns(padding: torch.Tensor, count: int) -> torch.Tensor:
    """[B, S] int64 columns of each row's own first real tokens."""
    return padding[:, None] + torch.arange(count, device=padding.device)
