"""Tokens of which every KV head has its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tokens:
    """Some tokens of a layer, dense.

    Attributes:
        k: [B, H, C, D] keys in the stored domain.
        v: [B, H, C, Dv] values.
        columns: [B, H, C] int64, -1 where a place holds no token.
        start: first column where all heads hold one run of columns, those of hidden tokens
            included; else None.
        k_order, v_order: [D] int64, the channel at each place where they are in tile order (see
            `decode_tiles`); None in natural order.
    """

    k: torch.Tensor
    v: torch.Tensor
    columns: torch.Tensor
    start: int | None = None
    k_order: torch.Tensor | None = None
    v_order: torch.Tensor | None = None

    def take(self, index: torch.Tensor) -> Tokens:
        """The tokens at `index` [B, H, N] int64, of tokens in natural order."""
        k, v = (
            x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3])) for x in (self.k, self.v)
        )
        return Tokens(k, v, self.columns.gather(2, index))

    def first(self, count: int) -> Tokens:
        """The first `count` tokens of every head."""
        k, v, columns = (x[:, :, :count] for x in (self.k, self.v, self.columns))
        return replace(self, k=k, v=v, columns=columns)

    def only(self, valid: torch.Tensor) -> Tokens:
        """The same places with no token where `valid` [B, H, C] is false."""
        return replace(self, columns=self.columns.masked_fill(~valid, -1))

    @staticmethod
    def at(k: torch.Tensor, v: torch.Tensor, first: int) -> Tokens:
        """Tokens of columns first, first + 1, ..., the same for all heads."""
        columns = torch.arange(first, first + k.shape[2], device=k.device)
        return Tokens(k, v, columns.expand(*k.shape[:2], -1), first)

    @staticmethod
    def join(parts: Sequence[Tokens]) -> Tokens:
        """All tokens of several parts in natural order, one after another."""
        k, v, columns = zip(*((p.k, p.v, p.columns) for p in parts), strict=True)
        return Tokens(torch.cat(k, 2), torch.cat(v, 2), torch.cat(columns, 2))


# Takes evicted tokens, each once.
Fold = Callable[[Tokens], None]
