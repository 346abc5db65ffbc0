"""Pages: one buffer each, with the encoded keys and values of a run of tokens for all rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from kvsmith.codec import Codec, Tensors
from kvsmith.kernels.low_rank.api import LowRankTerm
from kvsmith.layout import PageLayout, Place

# Dimension that counts blocks, of tensors that blocks share.
_BLOCK_DIM = {"index": 1, "value": 1, "start": 1, "left": 2, "right": 2, "factor_scale": 2}
_FACTORS = ("left", "right", "factor_scale")


class Page:
    """Encoded tokens of one layer.

    Args:
        layout: where the tensors lie.
        buffer: [B, layout.nbytes] uint8.

    Attributes:
        buffer: as given.
        sides: tensors of the keys and of the values, views [B, ...] of the buffer.
    """

    def __init__(self, layout: PageLayout, buffer: torch.Tensor) -> None:
        self.layout, self.buffer = layout, buffer
        self.sides = (_views(buffer, layout.k), _views(buffer, layout.v))


def new_page(layout: PageLayout, like: torch.Tensor) -> Page:
    """An empty page with as many rows as `like` has, on its device."""
    shape = (like.shape[0], layout.nbytes)
    return Page(layout, torch.zeros(shape, dtype=torch.uint8, device=like.device))


def _views(buffer: torch.Tensor, places: Mapping[str, Place]) -> Tensors:
    views = {}
    for name, place in places.items():
        part = buffer[:, place.offset : place.offset + place.info.nbytes]
        views[name] = part.view(place.info.dtype).unflatten(1, place.info.shape)
    return views


def write(tensors: Tensors, codec: Codec, offset: int, x: torch.Tensor) -> None:
    """Encode tokens [B, H, T, D] into one side of a page from token `offset` on."""
    rank = tensors["left"].shape[-2] if "left" in tensors else None
    stop = offset + x.shape[2]
    codec.encode(x, rank, {n: _tokens(t, n, codec, offset, stop) for n, t in tensors.items()})


def read(
    sides: Sequence[Tensors],
    codec: Codec,
    start: int,
    stop: int,
    tiles: bool = False,
    turned: bool = False,
    apart: bool = False,
) -> torch.Tensor:
    """Decode tokens [start, stop), counted from the first page; both at block boundaries.

    Returns:
        [B, H, stop - start, D] in the dtype that the codec decodes to; with `tiles` in tile order,
        with either in the codec's rotation; with `apart` without the low-rank part.
    """
    names = [n for n in sides[0] if not (apart and n in _FACTORS)]
    part = _gather(names, sides, codec, start, stop)
    return codec.decode_tiles(part) if tiles else codec.decode(part, turned)


def read_low_rank(
    sides: Sequence[Tensors], codec: Codec, start: int, stop: int, tiles: bool
) -> LowRankTerm | None:
    """The low-rank part of the same tokens; None for a codec without one."""
    names = [n for n in sides[0] if n in _FACTORS]
    return codec.low_rank(_gather(names, sides, codec, start, stop), tiles)


def _gather(
    names: Sequence[str], sides: Sequence[Tensors], codec: Codec, start: int, stop: int
) -> Tensors:
    """Named tensors of the tokens [start, stop), counted from the first page."""
    whole = sides[0] if len(sides) == 1 else {n: _join(n, codec, sides) for n in names}
    return {n: _tokens(whole[n], n, codec, start, stop) for n in names}


def _token_dim(name: str, codec: Codec) -> int:
    """Dimension of a page tensor that counts tokens, groups or blocks of them."""
    if name in ("scale", "zero"):
        return 1 if codec.format.axis == "token" and not codec.format.group else 2
    return _BLOCK_DIM.get(name, 2)


def _tokens(tensor: torch.Tensor, name: str, codec: Codec, start: int, stop: int) -> torch.Tensor:
    """View of the tokens [start, stop) of a page tensor."""
    unit = 1
    if name in ("scale", "zero") and codec.format.axis == "channel":
        unit = codec.format.group
    elif name in _BLOCK_DIM:
        unit = codec.format.block
    first, last = start // unit, -(-stop // unit)
    return tensor.narrow(_token_dim(name, codec), first, last - first)


def _join(name: str, codec: Codec, parts: Sequence[Tensors]) -> torch.Tensor:
    return torch.cat([p[name] for p in parts], dim=_token_dim(name, codec))
