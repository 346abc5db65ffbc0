"""Attention of new queries over the tokens that a layer kept, its state, and the new tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kvsmith.attention import (
    LOGIT_ELEMENTS,
    Mask,
    Rotation,
    Scores,
    attend_dense,
    natural,
    sink_partial,
)
from kvsmith.eviction.store import EvictingStore
from kvsmith.eviction.tokens import Tokens
from kvsmith.kernels.attend.api import Part, attend_parts
from kvsmith.kernels.column_scores.api import column_scores
from kvsmith.kernels.partial import Partial


def attend_kept(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    store: EvictingStore,
    mask: Mask,
    rotate: Rotation,
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
        part = part.merge(store.state.partial(store.natural(q), reader))
    return part.out.transpose(1, 2).to(q.dtype), mass


def attend_there(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    store: EvictingStore,
    mask: Mask,
    rotate: Rotation,
    scores: Scores,
    whole: torch.Tensor | None = None,
) -> tuple[Partial, torch.Tensor | None]:
    """Attention over the tokens that are there, without the state; arguments and mass as in
    `attend_kept`.

    Args:
        whole: [B, Hq, T] lse of the queries over all tokens ever; mass is then the attention of a
            model that evicts nothing, as H2O's published code scores. None in decoding.
    """
    old, policy, T = store.parts((rotate.pairs_halves, True)), store.policy, q.shape[2]
    keys = [rotate_tokens(rotate, p) for p in old]
    held, before = sum(x.shape[2] for x in keys), store.length - k.shape[2]
    shape = (*k.shape[:2], held + k.shape[2])
    mass = k.new_zeros(shape, dtype=torch.float32) if policy.scored else None
    done = []
    for rows in _row_slices(q, shape[2]):
        # The queries are the last T of the new tokens.
        stop = k.shape[2] - T + rows.stop if mask.is_causal else k.shape[2]
        some = q[:, :, rows]
        parts = [
            Part(_ordered(some, p), x, p.v, _visible(mask, rows, p, before, q.shape[1]))
            for x, p in zip(keys, old, strict=True)
        ]
        new = mask.window(rows, slice(before, before + stop))
        parts.append(Part(some, k[:, :, :stop], v[:, :, :stop], new))
        part, weights = _attended(parts, old, scores)
        if mass is not None and (rows.stop == T or not policy.last_query):
            if T == 1 and whole is None and scores.sink is None:
                mass = weights.unflatten(1, (k.shape[1], -1)).sum((2, 3))
            else:
                only = slice(-1, None) if policy.last_query else slice(None)
                lse = part.lse if whole is None else whole[:, :, rows]
                mass[:, :, : held + stop] += _mass(parts, lse, scores, only)
        done.append(part)
    return Partial(torch.cat([p.out for p in done], 2), torch.cat([p.lse for p in done], 2)), mass


def _attended(
    parts: Sequence[Part], old: Sequence[Tokens], scores: Scores
) -> tuple[Partial, torch.Tensor]:
    """Attention over all parts, kept ones first, and its weights before a learned sink."""
    outs, lse, weights = attend_parts(parts, scale=scores.scale, softcap=scores.softcap)
    out = outs[-1]
    for x, tokens in zip(outs, old, strict=False):
        out = out + (x if tokens.v_order is None else natural(x, tokens.v_order))
    part = Partial(out, lse)
    return part if scores.sink is None else part.merge(sink_partial(scores.sink, part)), weights


def rotate_tokens(rotate: Rotation, tokens: Tokens) -> torch.Tensor:
    """Keys [B, H, C, D] after RoPE, their channels in the order that they have."""
    if tokens.k_order is not None:
        return rotate.tiles(tokens.k, tokens.start, tokens.columns, tokens.k_order)
    if tokens.start is not None:
        return rotate(tokens.k, tokens.start, None)
    # Heads are laid side by side, since each has its own columns.
    B, H, C, D = tokens.k.shape
    flat = tokens.k.reshape(B, 1, H * C, D)
    return rotate(flat, None, tokens.columns.reshape(B, -1)).view(B, H, C, D)


def _ordered(q: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """Queries with their channels in the order of the keys'."""
    return q if tokens.k_order is None else q[..., tokens.k_order]


def _mass(parts: Sequence[Part], lse: torch.Tensor, scores: Scores, only: slice) -> torch.Tensor:
    """[B, H, C]: attention that keys of all parts receive from the queries in `only`."""
    found = []
    for x in parts:
        shared = x.mask is None or x.mask.shape[2] == 1
        found.append(
            column_scores(
                x.q[:, :, only],
                x.k,
                lse[:, :, only],
                scale=scores.scale,
                mask=x.mask if x.mask is None or shared else x.mask[:, :, only],
                softcap=scores.softcap,
            )
        )
    return torch.cat(found, 2)


def _row_slices(q: torch.Tensor, tokens: int) -> Iterator[slice]:
    """Queries a few at a time, so that their logits stay small."""
    step = max(1, LOGIT_ELEMENTS // (q.shape[0] * q.shape[1] * tokens))
    T = q.shape[2]
    return (slice(i, min(i + step, T)) for i in range(0, T, step))


def _visible(
    mask: Mask, rows: slice, tokens: Tokens, before: int, query_heads: int
) -> torch.Tensor | None:
    """[B, Hq, rows or 1, C] bool or float of kept tokens; None where all are seen.

    Rows with padding have holes.
    """
    if mask.is_causal:
        return None
    groups = query_heads // tokens.columns.shape[1]
    columns = tokens.columns.repeat_interleave(groups, 1)[:, :, None]  # [B, Hq, 1, C]
    whole = mask.window(rows, slice(0, before))
    if whole is None:
        return columns >= 0
    index = columns.clamp(min=0).expand(-1, -1, whole.shape[2], -1)
    shown = whole.expand(index.shape[0], index.shape[1], -1, -1).gather(-1, index)
    there = columns >= 0
    return shown & there if shown.dtype == torch.bool else shown.masked_fill(~there, float("-inf"))
