"""Definition of attend_encoded in plain torch: decode everything, rotate it, attend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from typing import TYPE_CHECKING

import torch

from kvsmith.kernels.attend.api import attend
from kvsmith.kernels.decode.api import decode
from kvsmith.kernels.low_rank.api import add_low_rank, read_factors
from kvsmith.kernels.partial import Partial

if TYPE_CHECKING:
    from kvsmith.kernels.attend_encoded.api import Body, Logits, Rope, Side, Window


def attend_encoded(
    q: torch.Tensor,
    body: Body,
    sinks: Window,
    recent: Window,
    query: int,
    logits: Logits,
    rope: Rope | None,
    first: torch.Tensor | None,
    windows: bool,
) -> Partial:
    """See `api.attend_encoded`."""
    B, device, S = q.shape[0], q.device, sinks.k.shape[2]
    start = torch.zeros(B, dtype=torch.int64, device=device) if first is None else first
    columns = S + torch.arange(body.begin, body.stop, device=device).expand(B, -1)
    k, v = decode_body(body, q)
    angles = None if rope is None else columns + rope.shift[:, None]
    held = columns >= start[:, None] + S
    parts = []
    if k.shape[2]:
        parts.append(_part(q, _rotate(k, angles, rope), v, columns, held, query, logits))
    if windows:
        parts.append(attend_windows(q, sinks, recent, query, logits, rope, first))
    return reduce(Partial.merge, parts)


def attend_windows(
    q: torch.Tensor,
    sinks: Window,
    recent: Window,
    query: int,
    logits: Logits,
    rope: Rope | None,
    first: torch.Tensor | None,
) -> Partial:
    """Attend to the dense windows alone; arguments as of `api.attend_encoded`."""
    B, device, S = q.shape[0], q.device, sinks.k.shape[2]
    start = torch.zeros(B, dtype=torch.int64, device=device) if first is None else first
    own = start[:, None] + torch.arange(S, device=device)
    new = torch.arange(recent.start, recent.start + recent.count, device=device).expand(B, -1)
    parts = [
        (_rotate(sinks.k, sinks.positions, rope), sinks.v, own, own >= 0),
        (
            _rotate(recent.k[:, :, : recent.count], _head(recent), rope),
            recent.v[:, :, : recent.count],
            new,
            new >= start[:, None] + S,
        ),
    ]
    partials = [_part(q, *part, query, logits) for part in parts if part[0].shape[2]]
    return reduce(Partial.merge, partials)


def decode_body(body: Body, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Readable body tokens, [B, H, C, D] float32 keys and values, turned back."""
    dense = []
    for i, side in enumerate((body.k, body.v)):
        pages = [_decoded(page.sides[i], side) for page in body.pages]
        empty = like.new_zeros((like.shape[0], body.heads, 0, side.dim), dtype=torch.float32)
        x = torch.cat([empty, *pages], dim=2)[:, :, : body.stop - body.begin]
        dense.append(x if side.turn is None else x @ side.turn.mT)
    return dense[0], dense[1]


def _decoded(tensors: Mapping[str, torch.Tensor], side: Side) -> torch.Tensor:
    x = decode(tensors, side.format, side.tables, side.dim)
    if side.factors is None:
        return x
    return add_low_rank(x, *read_factors(tensors, side.factors, side.dim))


def _head(window: Window) -> torch.Tensor | None:
    return None if window.positions is None else window.positions[:, : window.count]


def _rotate(k: torch.Tensor, positions: torch.Tensor | None, rope: Rope | None) -> torch.Tensor:
    """Rotate [B, H, C, D] keys at `positions` [B or 1, C]."""
    if rope is None:
        return k
    assert positions is not None
    turns = positions.double()[..., None] * rope.turns
    angle = ((turns - turns.floor()) * (2 * math.pi)).to(torch.float32)[:, None]
    lower, upper = k.float().chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return rope.scale * torch.cat([lower * cos - upper * sin, upper * cos + lower * sin], dim=-1)


def _part(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    columns: torch.Tensor,
    held: torch.Tensor,
    query: int,
    logits: Logits,
) -> Partial:
    """Attend to tokens at `columns` [B, C] of which `held` [B, C] are there."""
    own = torch.arange(query, query + q.shape[2], device=q.device)
    distance = own[None, :, None] - columns[:, None]  # [B, T, C]
    seen = held[:, None] & (distance >= 0)
    if logits.window is not None:
        seen = seen & (distance < logits.window)
    if logits.slopes is None:
        cap = logits.softcap
        return attend(q, k, v, scale=logits.scale, mask=seen[:, None], softcap=cap)
    return _biased(q, k, v, logits, seen, distance)


def _biased(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logits: Logits,
    seen: torch.Tensor,
    distance: torch.Tensor,
) -> Partial:
    """With ALiBi, which `attend` does not know."""
    assert logits.slopes is not None
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(groups, dim=1) for x in (k, v))
    raw = q.float() @ keys.transpose(-1, -2) * logits.scale
    if logits.softcap is not None:
        raw = logits.softcap * torch.tanh(raw / logits.softcap)
    raw = raw - logits.slopes[None, :, None, None] * distance[:, None]
    raw = raw.masked_fill(~seen[:, None], float("-inf"))
    lse = torch.logsumexp(raw, dim=-1)
    anchor = lse.masked_fill(lse.isneginf(), 0.0)
    return Partial(torch.exp(raw - anchor[..., None]) @ values, lse)
