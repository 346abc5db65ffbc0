"""Attention of new queries over a layer's stored tokens and the new tokens themselves.

The stored tokens arrive as dense segments, a few pages at a time; each gives a Partial, and the
partials merge. A dense copy of the whole cache never exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from kvsmith.fused import attend_step
from kvsmith.kernels.attend.api import attend
from kvsmith.kernels.partial import Partial
from kvsmith.store import LayerStore, Segment

# Elements of keys decoded at once and of logits held at once: small enough to stay near the
# processor.
CHUNK_ELEMENTS = 1 << 19
LOGIT_ELEMENTS = 1 << 23


class Mask(Protocol):
    """Which columns a query may see."""

    @property
    def reach(self) -> int | None:
        """Columns that a query sees back, itself included, where that and left padding are all
        there is to the mask (`fused.UNLIMITED` for all of them); None where it is not.
        """

    @property
    def padding(self) -> torch.Tensor | None:
        """[B] int64 columns of left padding; None where no row has any."""

    @property
    def is_causal(self) -> bool:
        """Whether a query sees every column up to its own, in every row."""

    def window(self, rows: slice, columns: slice) -> torch.Tensor | None:
        """[B or 1, 1, rows, columns] bool, or [B or 1, Hq, rows, columns] float that is added to
        logits; None where all queries see all columns.
        """


class Rotation(Protocol):
    """RoPE of stored keys; identity where they are stored rotated or the model has none."""

    @property
    def pairs_halves(self) -> bool:
        """Whether channels d and d + D/2 turn together, or nothing turns: `tiles` may be called."""

    def tiles(
        self,
        k: torch.Tensor,
        start: int | None,
        columns: torch.Tensor | None,
        order: torch.Tensor,
        /,
    ) -> torch.Tensor:
        """Rotate [B, H, C, D] float32 keys in tile order, in place, that lie at columns start,
        start + 1, ... or at `columns` [B, H, C].
        """

    def __call__(
        self, k: torch.Tensor, start: int | None, columns: torch.Tensor | None, /
    ) -> torch.Tensor:
        """Rotate [B, H, C, D] keys that lie at columns start, start + 1, ... or at `columns` [B,
        C].
        """


@dataclass(frozen=True)
class Scores:
    """How logits are formed.

    Attributes:
        scale: factor on q k^T.
        softcap: see `attend`.
        sink: [Hq] learned logit of a token without value (GPT-OSS), None for none.
    """

    scale: float
    softcap: float | None = None
    sink: torch.Tensor | None = None


def attend_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    store: LayerStore,
    before: int,
    mask: Mask,
    rotate: Rotation,
    scores: Scores,
) -> torch.Tensor:
    """Attend to the first `before` columns of a layer as stored, and to the new tokens exactly.

    Args:
        q: [B, Hq, T, D] rotated queries, of the last T new tokens.
        k: [B, H, T', D] rotated keys of the new tokens.
        v: [B, H, T', Dv] values of the new tokens.
        store: the layer.
        before: columns stored before the new tokens.
        mask: visibility; its columns are the stored ones followed by the new ones.
        rotate: RoPE for stored keys.
        scores: scale and its like.

    Returns:
        [B, T, Hq, Dv] in the dtype of q.
    """
    if before == 0 and scores.softcap is None and scores.sink is None:
        return attend_dense(q, k, v, mask, scores.scale)
    T, Hq = q.shape[2], q.shape[1]
    whole = attend_step(q, store, before + k.shape[2] - T, mask, rotate, scores)
    if whole is not None:
        if scores.sink is not None:
            whole = whole.merge(sink_partial(scores.sink, whole))
        return whole.out.transpose(1, 2).to(q.dtype)
    row_elements = q.shape[0] * Hq * max(k.shape[2], 1)
    step = max(1, min(T, LOGIT_ELEMENTS // row_elements))
    chunk = max(1, CHUNK_ELEMENTS // (k.shape[0] * k.shape[1] * k.shape[3]))
    parts: list[Partial | None] = [None] * -(-T // step)

    def add(i: int, part: Partial) -> None:
        held = parts[i]
        parts[i] = part if held is None else held.merge(part)

    rows = [slice(i * step, min((i + 1) * step, T)) for i in range(len(parts))]
    # By linearity a low-rank term costs queries x rank; added to the keys, head dim x rank. Only
    # keys that wait for RoPE need it added.
    few = T * Hq // k.shape[1] <= k.shape[3]
    apart = (few and store.spec.key_domain == "post", few)
    for segment in store.segments(before, chunk, rotate.pairs_halves, True, apart):
        keys, queries = _rotated(q, segment, rotate)
        for i, r in enumerate(rows):
            seen = _visible(mask, r, segment, store, before)
            part = attend(
                queries[:, :, r],
                keys,
                segment.v,
                scale=scores.scale,
                mask=seen,
                softcap=scores.softcap,
                k_low=segment.k_low,
                v_low=segment.v_low,
            )
            if segment.v_order is not None:
                part = Partial(natural(part.out, segment.v_order), part.lse)
            if segment.v_turn is not None:
                part = Partial(_turned(part.out, segment.v_turn.mT), part.lse)
            add(i, part)
        del segment, keys  # before the next chunk is decoded
    new_tokens = k.shape[2]
    for i, r in enumerate(rows):
        # The queries are the last T of the new tokens.
        last = new_tokens - T + r.stop if mask.is_causal else new_tokens
        seen = mask.window(r, slice(before, before + last))
        new = attend(
            q[:, :, r],
            k[:, :, :last],
            v[:, :, :last],
            scale=scores.scale,
            mask=seen,
            softcap=scores.softcap,
        )
        add(i, new)
        if scores.sink is not None:
            add(i, sink_partial(scores.sink, new))
    out = torch.cat([p.out for p in parts if p is not None], dim=2)
    return out.transpose(1, 2).to(q.dtype)


def _rotated(
    q: torch.Tensor, segment: Segment, rotate: Rotation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated keys of a segment, and the queries in the same basis, channels in the same order."""
    if segment.k_turn is not None:
        q = _turned(q, segment.k_turn)
    if segment.k_order is None:
        return rotate(segment.k, segment.start, segment.columns), q
    keys = rotate.tiles(segment.k, segment.start, None, segment.k_order)
    return keys, q[..., segment.k_order]


def _turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """[B, Hq, T, D] times the matrix of each KV head, [H or 1, D, D]."""
    grouped = x.float().unflatten(1, (len(turn), -1)) if len(turn) > 1 else x.float()[:, None]
    return (grouped @ turn[:, None]).flatten(1, 2).to(x.dtype)


def natural(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Channels [..., D] back in natural order."""
    return torch.empty_like(x).index_copy_(-1, order, x)


def attend_dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float
) -> torch.Tensor:
    """Nothing is stored yet: plain attention over the new tokens."""
    grouped = q.shape[1] != k.shape[1]
    T, tokens = q.shape[2], k.shape[2]
    if mask.is_causal and T == tokens:
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=T > 1, scale=scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)
    step = max(1, min(T, LOGIT_ELEMENTS // (q.shape[0] * tokens)))
    outs = []
    for r in _slices(T, step):
        seen = mask.window(r, slice(0, tokens))
        if seen is not None:
            # A padded query sees nothing; any finite output will do, NaN would spread through later
            # layers.
            seen = _never_blind(seen)
        outs.append(
            F.scaled_dot_product_attention(q[:, :, r], k, v, seen, scale=scale, enable_gqa=grouped)
        )
    return torch.cat(outs, dim=2).transpose(1, 2)


def _never_blind(seen: torch.Tensor) -> torch.Tensor:
    if seen.dtype == torch.bool:
        return seen | ~seen.any(-1, keepdim=True)
    return seen.masked_fill(seen.isneginf().all(-1, keepdim=True), 0.0)


def _slices(total: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, total)) for i in range(0, total, step))


def _visible(
    mask: Mask, rows: slice, segment: Segment, store: LayerStore, before: int
) -> torch.Tensor | None:
    """Mask of a segment; with padding a row's sinks are seen in the sink segment alone."""
    if segment.start is not None:
        columns = slice(segment.start, segment.start + segment.k.shape[2])
        seen = mask.window(rows, columns)
        if store.padding is None:
            return seen
        place = torch.arange(columns.start, columns.stop, device=store.padding.device)
        offset = place - store.padding[:, None]  # [B, C]
        elsewhere = ((offset < 0) | (offset >= store.spec.sinks))[:, None, None]
        return elsewhere if seen is None else seen & elsewhere
    assert segment.columns is not None
    limit = max(before, 1)
    whole = mask.window(rows, slice(0, limit))
    valid = (segment.columns < before)[:, None, None]  # [B, 1, 1, S]
    if whole is None:
        return valid
    index = segment.columns.clamp(max=limit - 1)[:, None, None].expand(-1, -1, whole.shape[2], -1)
    return whole.expand(index.shape[0], -1, -1, -1).gather(-1, index) & valid


def sink_partial(sink: torch.Tensor, like: Partial) -> Partial:
    """A token with a logit and no value adds to the denominator alone."""
    return Partial(torch.zeros_like(like.out), sink.float()[None, :, None].expand_as(like.lse))
