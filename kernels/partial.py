"""Attention over a part of the tokens, and how parts merge.

A query that meets a set of tokens gives `Partial(out, lse)`: the softmax-weighted values and the
natural log of the softmax denominator. For disjoint sets a and b, with lse = log(e^a.lse +
e^b.lse),

    out = a.out * e^(a.lse - lse) + b.out * e^(b.lse - lse).

A set without a visible token has lse = -inf and out = 0 and is neutral. Source: FlashAttention's
online softmax (arXiv:2205.14135), the "attention state" of FlashInfer (arXiv:2501.01005).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Partial:
    """Attention of queries over a set of tokens.

    Attributes:
        out: [B, Hq, T, D] float32, softmax-weighted values over the set.
        lse: [B, Hq, T] float32, natural log of the sum of exponentiated logits, -inf for an empty
            set.
    """

    out: torch.Tensor
    lse: torch.Tensor

    def merge(self, other: Partial) -> Partial:
        """Attention over the union of two disjoint sets.

        Args:
            other: the other set; same shapes.

        Returns:
            Partial of the union.
        """
        lse = torch.logaddexp(self.lse, other.lse)
        # Where both sets are empty, -inf - -inf is NaN; there the output is zero whatever the
        # weight.
        anchor = lse.masked_fill(lse.isneginf(), 0.0)
        mine = torch.exp(self.lse - anchor).unsqueeze(-1)
        theirs = torch.exp(other.lse - anchor).unsqueeze(-1)
        return Partial(self.out * mine + other.out * theirs, lse)
