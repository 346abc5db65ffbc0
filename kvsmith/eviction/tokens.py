"""Tokens of which every KV head has its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tokens:
    """Some tokens of a layer, dense.

    Attributes:
        k: [B, H, C, D] keys in the stored domain.
        v: [B, H, C, Dv] values.
        columns: [B, H, C] int64, -1 where a place holds no token.
    """

    k: torch.Tensor
    v: torch.Tensor
    columns: torch.Tensor

    def take(self, index: torch.Tensor) -> Tokens:
        """The tokens at `index` [B, H, N] int64."""
        k, v = (
            x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3])) for x in (self.k, self.v)
        )
        return Tokens(k, v, self.columns.gather(2, index))

    def first(self, count: int) -> Tokens:
        """The first `count` tokens of every head."""
        return Tokens(self.k[:, :, :count], self.v[:, :, :count], self.columns[:, :, :count])

    def only(self, valid: torch.Tensor) -> Tokens:
        """The same places with no token where `valid` [B, H, C] is false."""
        return Tokens(self.k, self.v, self.columns.masked_fill(~valid, -1))

    @staticmethod
    def at(k: torch.Tensor, v: torch.Tensor, first: int) -> Tokens:
        """Tokens of columns first, first + 1, ..., the same for all heads."""
        columns = torch.arange(first, first + k.shape[2], device=k.device)
        return Tokens(k, v, columns.expand(*k.shape[:2], -1))

    @staticmethod
    def join(parts: Sequence[Tokens]) -> Tokens:
        """All tokens of several parts, in order."""
        k, v, columns = zip(*((p.k, p.v, p.columns) for p in parts), strict=True)
        return Tokens(torch.cat(k, 2), torch.cat(v, 2), torch.cat(columns, 2))


# Takes evicted tokens, each once.
Fold = Callable[[Tokens], None]
