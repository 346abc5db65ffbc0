"""Attention of new queries over the tokens that a layer kept, its state, and the new tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kvsmith.attention import LOGIT_ELEMENTS, Mask, Scores, attend_dense, sink_partial
from kvsmith.eviction.store import EvictingStore
from kvsmith.eviction.tokens import Tokens
from kvsmith.kernels.attend.api import attend
from kvsmith.kernels.column_scores.api import column_scores
from kvsmith.kernels.partial import Partial

# Rotates [B, H, C, D] keys at columns [B, C]; see `attention.Rotation`.
Rotate = Callable[[torch.Tensor, int | None, torch.Tensor | None], torch.Tensor]


def attend_kept(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    store: EvictingStore,
    mask: Mask,
    rotate: Rotate,
    scores: Scores,
    reader: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend to what is left of earlier tokens, and to the new ones exactly.

    The probabilities that are scored are those among the tokens that are there, without the state:
    which tokens stay does not depend on it.

    Args:
        q: [B, Hq, T, D] rotated queries, of the last T new tokens.
        k: [B, H, T', D] rotated keys of the new tokens.
        v: [B, H, T', Dv] values of the new tokens.
        store: the layer; the new tokens are appended and not settled.
        mask: visibility; its columns are all earlier ones followed by the new ones.
        rotate: RoPE for stored keys.
        scores: scale and its like.
        reader: which of the layers that read the store asks.

    Returns:
        out [B, T, Hq, Dv] in the dtype of q; mass [B, H, C + T'] float32 for `store.settle`, None
        where the policy does not ask.
    """
    plain = scores.softcap is None and scores.sink is None and not store.policy.scored
    if store.length == k.shape[2] and plain:
        return attend_dense(q, k, v, mask, scores.scale), None
    part, mass = attend_there(q, k, v, store, mask, rotate, scores)
    if store.state is not None and store.length > k.shape[2]:
        part = part.merge(store.state.partial(q, reader))
    return part.out.transpose(1, 2).to(q.dtype), mass


def attend_there(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    store: EvictingStore,
    mask: Mask,
    rotate: Rotate,
    scores: Scores,
    whole: torch.Tensor | None = None,
) -> tuple[Partial, torch.Tensor | None]:
    """Attention over the tokens that are there, without the state; arguments and mass as in
    `attend_kept`.

    Args:
        whole: [B, Hq, T] lse of the queries over all tokens ever; mass is then the attention of a
            model that evicts nothing, as H2O's published code scores. None in decoding.
    """
    old, policy, T = store.kept(), store.policy, q.shape[2]
    keys, values = k, v
    if old is not None:
        keys = torch.cat([rotate_tokens(rotate, old), k], 2)
        values = torch.cat([old.v, v], 2)
    held, before = keys.shape[2] - k.shape[2], store.length - k.shape[2]
    mass = keys.new_zeros(keys.shape[:3], dtype=torch.float32) if policy.scored else None
    parts = []
    for rows in _row_slices(q, keys):
        # The queries are the last T of the new tokens.
        stop = k.shape[2] - T + rows.stop if mask.is_causal else k.shape[2]
        some, seen_keys = q[:, :, rows], keys[:, :, : held + stop]
        seen = _visible(mask, rows, old, before, stop, q.shape[1])
        part = attend(
            some,
            seen_keys,
            values[:, :, : held + stop],
            scale=scores.scale,
            mask=seen,
            softcap=scores.softcap,
        )
        if scores.sink is not None:
            part = part.merge(sink_partial(scores.sink, part))
        if mass is not None and (rows.stop == T or not policy.last_query):
            only = slice(-1, None) if policy.last_query else slice(None)
            lse = part.lse if whole is None else whole[:, :, rows]
            mass[:, :, : held + stop] += _mass(some, seen_keys, lse, seen, scores, only)
        parts.append(part)
    return Partial(torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2)), mass


def rotate_tokens(rotate: Rotate, tokens: Tokens) -> torch.Tensor:
    """Keys [B, H, C, D] after RoPE; heads are laid side by side, since each has its own columns."""
    B, H, C, D = tokens.k.shape
    flat = tokens.k.reshape(B, 1, H * C, D)
    return rotate(flat, None, tokens.columns.reshape(B, -1).clamp(min=0)).view(B, H, C, D)


def _mass(
    q: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    seen: torch.Tensor | None,
    scores: Scores,
    only: slice,
) -> torch.Tensor:
    """[B, H, C]: attention that keys receive from the queries in `only`."""
    mask = seen if seen is None or seen.shape[2] == 1 else seen[:, :, only]
    return column_scores(
        q[:, :, only],
        keys,
        lse[:, :, only],
        scale=scores.scale,
        mask=mask,
        softcap=scores.softcap,
    )


def _row_slices(q: torch.Tensor, keys: torch.Tensor) -> Iterator[slice]:
    """Queries a few at a time, so that their logits stay small."""
    step = max(1, LOGIT_ELEMENTS // (q.shape[0] * q.shape[1] * keys.shape[2]))
    T = q.shape[2]
    return (slice(i, min(i + step, T)) for i in range(0, T, step))


def _visible(
    mask: Mask, rows: slice, old: Tokens | None, before: int, stop: int, query_heads: int
) -> torch.Tensor | None:
    """[B, Hq or 1, rows or 1, C + stop] bool or float of kept and new tokens; None where all are
    seen.
    """
    new = mask.window(rows, slice(before, before + stop))
    if old is None:
        return new
    kept = None if mask.is_causal else _visible_kept(mask, rows, old, before, query_heads)
    if kept is None and new is None:
        return None
    B, H, C = old.columns.shape
    if kept is None:
        assert new is not None
        kept = new.new_ones((1, 1, 1, C))
    if new is None:
        new = kept.new_ones((1, 1, 1, stop))
    whole = [max(a, b) for a, b in zip(kept.shape[:3], new.shape[:3], strict=True)]
    return torch.cat([kept.expand(*whole, C), new.expand(*whole, stop)], -1)


def _visible_kept(
    mask: Mask, rows: slice, old: Tokens, before: int, query_heads: int
) -> torch.Tensor:
    """[B, Hq, rows or 1, C] bool or float of kept tokens; rows have holes here."""
    groups = query_heads // old.columns.shape[1]
    columns = old.columns.repeat_interleave(groups, 1)[:, :, None]  # [B, Hq, 1, C]
    whole = mask.window(rows, slice(0, before))
    if whole is None:
        return columns >= 0
    index = columns.clamp(min=0).expand(-1, -1, whole.shape[2], -1)
    shown = whole.expand(index.shape[0], index.shape[1], -1, -1).gather(-1, index)
    there = columns >= 0
    return shown & there if shown.dtype == torch.bool else shown.masked_fill(~there, float("-inf"))
