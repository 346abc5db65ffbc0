"""attend_encoded: queries of the newest tokens over a layer as it is stored -> Partial.

The layer is an encoded body in pages and dense windows around it (see `kvsmith/store.py`):

    columns first[b] .. first[b] + S - 1     sinks, each row's own first tokens
    columns S .. stop - 1                    body, hidden where a padded row's sinks lie
    columns recent.start .. query            dense, the newest tokens included

first[b] is the left padding of row b. Keys lie before RoPE, or after it (`rope` None).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kvsmith.errors import explain
from kvsmith.kernels.attend_encoded import reference
from kvsmith.kernels.choice import Impl, preferred
from kvsmith.kernels.format import Factors, Format, Tables
from kvsmith.kernels.partial import Partial


class EncodedPage(Protocol):
    """A page: tensors [B, ...] of its keys and of its values as `encode_pack` names them, views of
    one buffer.
    """

    @property
    def sides(self) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
        """Of keys, of values."""


@dataclass(frozen=True)
class Side:
    """Encoded keys, or values.

    Attributes:
        format: the layout.
        tables: codebook and calibrated ranges.
        dim: channels of a head D.
        turn: [H or 1, D, D] float32, orthogonal; tokens were multiplied by it before they were
            encoded, those of the windows were not; None for none.
        factors: how the low-rank term is stored; None without one.
        rank: its columns R in every page.
    """

    format: Format
    tables: Tables
    dim: int
    turn: torch.Tensor | None = None
    factors: Factors | None = None
    rank: int = 0


@dataclass(frozen=True)
class Body:
    """Encoded tokens of one layer.

    Attributes:
        pages: the pages that are still held, in order.
        table: [>= pages] int64 addresses of the buffers, on the device; None makes one.
        heads: KV heads H.
        page_size: tokens of a page.
        begin, stop: body tokens that are held and readable; begin is a multiple of page_size.
        k, v: how keys and values are stored.
    """

    pages: Sequence[EncodedPage]
    table: torch.Tensor | None
    heads: int
    page_size: int
    begin: int
    stop: int
    k: Side
    v: Side


@dataclass(frozen=True)
class Window:
    """Dense tokens.

    Attributes:
        k: [B, H, C, D] keys, [C, D] contiguous.
        v: [B, H, C, Dv] values.
        positions: [B or 1, C] int64 position ids, None without RoPE.
        start: column of the first token (not of sinks).
        count: tokens in use.
    """

    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor | None
    start: int
    count: int


@dataclass(frozen=True)
class Rope:
    """Half-split RoPE over all channels of a key head.

    Attributes:
        turns: [D / 2] float64, revolutions a position: inverse frequency / 2 pi.
        scale: factor on rotated keys (YaRN).
        shift: [B] int64, position id minus column, the same for all body tokens of a row.
    """

    turns: torch.Tensor
    scale: float
    shift: torch.Tensor


@dataclass(frozen=True)
class Logits:
    """How logits are formed and which are seen.

    Attributes:
        scale: factor on q k^T.
        softcap: see `attend`.
        window: columns that a query sees back, itself included; None for all.
        slopes: [Hq] float32, ALiBi: a logit loses slope * (query column - column).
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    slopes: torch.Tensor | None = None


def attend_encoded(
    q: torch.Tensor,
    body: Body,
    sinks: Window,
    recent: Window,
    query: int,
    logits: Logits,
    *,
    rope: Rope | None = None,
    first: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    windows: bool = True,
    impl: Impl | None = None,
) -> Partial:
    """Attend to everything that a layer stores, or to a run of its pages.

    Args:
        q: [B, H * G, T, D] float, rotated queries at columns query, query + 1, ...
        body: encoded tokens.
        sinks: dense first tokens of each row, all S of them allocated.
        recent: dense newest tokens; they include the queries' own.
        query: column of the first query; a query sees columns up to its own.
        logits: scale and its like.
        rope: how keys are rotated; None where they are stored rotated or the model has none.
        first: [B] int64, left padding; None for none.
        counts: [5] int64 on the device: body.stop, body.begin, query, recent.start, recent.count,
            which the kernel then reads in their place, so that a CUDA graph can be replayed as
            these grow within the pages of the table; None for the numbers given. Where a side has
            a `turn` the windows are read by the numbers given all the same.
        windows: whether to attend to the dense windows too; without them the parts of several
            bodies merge.
        impl: who computes it; None for `choice.preferred` where the kernel supports the layer.

    Returns:
        Partial with out [B, H * G, T, Dv] and lse [B, H * G, T], float32.

    Raises:
        ValueError: the shapes do not fit, or `impl` cannot do it (`unsupported` and
            `native.unsupported` say why).
    """
    H = body.heads
    if q.shape[1] % H or q.shape[-1] != body.k.dim or sinks.k.shape[1] != H:
        shapes = f"q {tuple(q.shape)}, {H} KV heads of {body.k.dim}"
        raise ValueError(explain("attend_encoded", "shapes", "q [B, H * G, T, D]", shapes))
    if rope is not None and body.k.factors is not None:
        # It was found after RoPE, or would have to be turned with every token.
        raise ValueError(explain("attend_encoded", "rope", "None beside a low-rank term", "given"))
    impl = impl or chosen(body, q)
    if impl == "reference":
        return reference.attend_encoded(q, body, sinks, recent, query, logits, rope, first, windows)
    if why := _refused(body, q, impl):
        raise ValueError(explain("attend_encoded", "impl", "one that supports this layer", why))
    # Both need what is defined here.
    from kvsmith.kernels.attend_encoded import launch, native

    if impl == "native":
        return native.attend_encoded(q, body, sinks, recent, query, logits, rope, first, windows)
    args = (sinks, recent, query, logits, rope, first, counts, windows)
    return launch.attend_encoded(q, body, *args)


def chosen(body: Body, q: torch.Tensor) -> Impl:
    """The implementation that runs where none is asked for."""
    wanted = preferred(q.device, native=True)
    return "reference" if wanted != "reference" and _refused(body, q, wanted) else wanted


def _refused(body: Body, q: torch.Tensor, impl: Impl) -> str | None:
    from kvsmith.kernels.attend_encoded import native

    why = unsupported(body, q.shape, impl)
    return native.unsupported(body, q) if impl == "native" and why is None else why


def unsupported(body: Body, shape: Sequence[int], impl: Impl = "triton") -> str | None:
    """Why a kernel cannot read a layer, for queries of this shape; None where it can."""
    if shape[1] // body.heads * shape[2] > 64:
        return f"{shape[2]} queries at once"
    for side in (body.k, body.v):
        fmt, half = side.format, side.dim // 2
        if side.dim % 2 or not 8 <= side.dim <= 256:
            return f"head dim {side.dim}"
        if fmt.axis == "token" and fmt.group and half % fmt.group and fmt.group != side.dim:
            return f"groups of {fmt.group} channels that straddle the halves of {side.dim}"
        odd = impl == "triton" and side.factors and side.factors.bits not in (0, 2, 4, 8)
        if side.factors and (odd or side.dim % 8):
            return f"factors of {side.factors.bits} bits at head dim {side.dim}"
    if tile_tokens(body) is None:
        return f"blocks or groups of tokens that do not fit pages of {body.page_size}"
    return None


def tile_tokens(body: Body, wanted: int = 16) -> int | None:
    """Tokens that a kernel reads at once.

    Args:
        body: the layer.
        wanted: tokens where pages, blocks and groups allow that; 16 are the rows of a tensor core.

    Returns:
        The power of two from 16 to 128 that is closest and fits; None where none does.
    """
    for tokens in sorted((16, 32, 64, 128), key=lambda n: abs(n - wanted)):
        fits = body.page_size % tokens == 0
        for fmt in (body.k.format, body.v.format):
            # Corrections are found by block, a channel's range by group.
            fits &= not fmt.slots or tokens % fmt.block == 0
            fits &= fmt.axis == "token" or not fmt.group or fmt.group % tokens == 0
        if body.k.factors or body.v.factors:
            block = body.k.format.block
            fits &= tokens % block == 0 or block % tokens == 0
        if fits:
            return tokens
    return None
