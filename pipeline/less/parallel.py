"""The state for many positions at once, as a differentiable function of its features.

Evicted tokens come in blocks, so the state takes prefix sums over blocks, and the queries between
two evictions share one: no T x T map. In log space, as the runtime's `State`. Training looks at
every `stride`-th block of queries, which costs that much less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvsmith.kernels.partial import Partial
from kvsmith.less.features import FeatureMap
from kvsmith.pipeline.less.record import Replay

TINY = 1e-30  # below any prefix that matters beside the largest feature


@dataclass(frozen=True)
class Pick:
    """Blocks of queries offset, offset + stride, ...; every one of them by default."""

    offset: int = 0
    stride: int = 1

    def rows(self, x: Tensor, block: int) -> Tensor:
        """Of [B, H, E * block, ...] the rows of the blocks, [B, H, E' * block, ...]."""
        return x.unflatten(2, (-1, block))[:, :, self.offset :: self.stride].flatten(2, 3)


def attend_state(
    features: FeatureMap, rank: int, q: Tensor, gone: Replay, pick: Pick | None = None
) -> Partial:
    """Attention of queries over the state that each would find.

    Args:
        features: the maps.
        rank: features in use, the first ones.
        q: [B, Hq, E * block, D] queries after RoPE.
        gone: what is evicted when.
        pick: blocks of queries; None for all.

    Returns:
        Partial [B, Hq, E' * block, ...].
    """
    pick = pick or Pick()
    B, H, _, D = gone.v.shape
    block, G = gone.block, q.shape[1] // H
    queries = pick.rows(q, block)
    count = queries.shape[2] // block
    log_psi = features.log_psi(gone.k)[..., :rank]
    top = log_psi.detach().amax(2, keepdim=True)  # [B, H, 1, R]
    psi, values = (
        _segments(x, pick, block, count) for x in (torch.exp(log_psi - top), gone.v.float())
    )
    z = psi.sum(3).cumsum(2)  # [B, H, E', R]
    means = (psi.transpose(-1, -2) @ values).cumsum(2) / (z[..., None] + TINY)
    log_z = torch.log(z + TINY) + top
    log_phi = features.log_phi(queries)[..., :rank]
    # [B, H, E', G * block, R]
    logits = log_phi.view(B, H, G, count, block, rank).transpose(2, 3).flatten(3, 4)
    logits = logits + log_z[:, :, :, None]
    lse = torch.logsumexp(logits, -1).view(B, H, count, G, block)
    out = (torch.softmax(logits, -1) @ means).view(B, H, count, G, block, D)
    shape = (B, H * G, count * block)
    return Partial(out.transpose(2, 3).reshape(*shape, D), lse.transpose(2, 3).reshape(shape))


def _segments(x: Tensor, pick: Pick, block: int, count: int) -> Tensor:
    """[B, H, N, D] cut where a picked block of queries comes, [B, H, E', stride * block, D]."""
    size = pick.stride * block
    used = x[:, :, : (pick.offset + 1) * block + (count - 1) * size]
    return F.pad(used, (0, 0, count * size - used.shape[2], 0)).unflatten(2, (count, size))
