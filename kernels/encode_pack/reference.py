"""Definition of encode_pack in plain torch; the formula stands in `api.py`."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from kvsmith.kernels.decode.reference import expand_range
from kvsmith.kernels.format import Format, Tables, index_dtype
from kvsmith.kernels.pack.api import pack

_INF = float("inf")


def encode_pack(
    x: torch.Tensor, fmt: Format, tables: Tables, left: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """See `api.encode_pack`."""
    x = x.float()
    B, H, T, D = x.shape
    tensors: dict[str, torch.Tensor] = {}
    place = None
    if fmt.group == 0 and fmt.axis == "channel":
        assert tables.scale is not None and tables.zero is not None
        scale, zero = tables.scale[:, None], tables.zero[:, None]  # [H, 1, D]
    else:
        low, high, place = online_range(x, fmt)
        tensors["scale"], tensors["zero"] = store_range(low, high, fmt.store)
        scale = expand_range(tensors["scale"].float(), x.shape, fmt)
        zero = expand_range(tensors["zero"].float(), x.shape, fmt)
    normal = ((x - zero) / scale).masked_fill(scale == 0, 0.0)
    codes = torch.bucketize(normal, tables.edges, out_int32=True)
    tensors["codes"] = pack(codes.to(torch.uint8), fmt.bits)
    if fmt.slots == 0 and left is None:
        return tensors
    error = tables.lut.index_select(0, codes.reshape(-1)).view(x.shape)
    error = torch.sub(x, error.mul_(scale).add_(zero), out=left)
    if fmt.slots:
        if place is None:
            worst = normal if fmt.outliers == "threshold" else error
            tokens = worst.abs().transpose(1, 2).reshape(B, T, H * D)
            place = _places(tokens.topk(fmt.slots, dim=-1).indices, fmt, D)
        place = place.sort(dim=-1).values
        value = _blocks(error, fmt).gather(-1, place)
        if fmt.outliers == "threshold":
            value *= _blocks(normal, fmt).gather(-1, place).abs() > 1
        limit = torch.finfo(fmt.store).max
        value = value.clamp_(-limit, limit).to(fmt.store)
        if left is not None:
            _subtract(left, place, value, fmt)
        if spare := fmt.block * fmt.slots - place.shape[2]:
            place = torch.cat([place, place[:, :, -1:].expand(-1, -1, spare)], dim=2)
            value = F.pad(value, (0, spare))
        tensors |= _by_head(place, value, fmt, H, D)
    return tensors


def _subtract(x: torch.Tensor, place: torch.Tensor, value: torch.Tensor, fmt: Format) -> None:
    """Take corrections at positions that `_blocks` counts from x [B, H, T, D]."""
    T, area = x.shape[2], fmt.block * x.shape[3]
    flat = place // area * (T * x.shape[3]) + place % area
    flat += torch.arange(place.shape[1], device=x.device)[:, None] * area
    x.view(x.shape[0], -1).scatter_add_(1, flat.flatten(1), -value.float().flatten(1))


def _places(index: torch.Tensor, fmt: Format, dim: int) -> torch.Tensor:
    """Positions in a block [B, T / block, block * N] of a token's outliers [B, T, N], which count
    head * D + channel.
    """
    B, T, N = index.shape
    token = torch.arange(T, device=index.device)[:, None] % fmt.block
    place = index // dim * (fmt.block * dim) + token * dim + index % dim
    return place.view(B, T // fmt.block, fmt.block * N)


def _blocks(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The elements of each block in the order that positions count, [B, T / block, H * block *
    D].
    """
    return x.unflatten(2, (-1, fmt.block)).transpose(1, 2).flatten(2)


def _by_head(
    place: torch.Tensor, value: torch.Tensor, fmt: Format, heads: int, dim: int
) -> dict[str, torch.Tensor]:
    """Corrections at ascending positions [B, T / block, block * N] as they are stored."""
    area = fmt.block * dim
    firsts = torch.arange(heads + 1, device=place.device) * area
    start = torch.searchsorted(place, firsts.expand(*place.shape[:2], -1).contiguous())
    return {
        "index": (place % area).to(index_dtype(area - 1)),
        "value": value,
        "start": start.to(index_dtype(place.shape[2])),
    }


def online_range(
    x: torch.Tensor, fmt: Format
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Smallest and largest element of every range, and the outliers left out of them.

    Args:
        x: [B, H, T, D] float32.
        fmt: the layout.

    Returns:
        (low, high, place): the first two shaped like the stored range; place [B, T / block, block *
        N] int64, positions of the outliers as `_blocks` counts them, or None.
    """
    B, H, T, D = x.shape
    place, upper, lower = None, x, x
    if fmt.axis == "token" and not fmt.group:
        tokens = x.transpose(1, 2).reshape(B, T, H * D)
        if not fmt.slots:
            return tokens.amin(-1), tokens.amax(-1), None
        low, high, index = split_extremes(tokens, fmt.slots)
        return low, high, _places(index, fmt, D)
    if fmt.slots and fmt.axis == "channel":
        channels = x.unflatten(2, (-1, fmt.block)).transpose(3, 4)  # [B, H, T / block, D, block]
        low, high, index = split_extremes(channels, fmt.channel_slots, "mean")
        head = torch.arange(0, H * fmt.block, fmt.block, device=x.device)[:, None, None, None]
        place = (index + head).mul_(D).add_(torch.arange(D, device=x.device)[:, None])
        place = place.transpose(1, 2).flatten(2)
        if fmt.group == fmt.block:
            return low, high, place
    elif fmt.slots:
        tokens = x.transpose(1, 2).reshape(B, T, H * D)
        place = _places(split_extremes(tokens, fmt.slots)[2], fmt, D)
    if place is not None:
        upper, lower = (_filled(x, place, fmt, end) for end in (_INF, -_INF))
    dim, size = (2, T) if fmt.axis == "channel" else (3, D)
    sizes = (size // fmt.group, fmt.group)
    low, high = upper.unflatten(dim, sizes).amin(dim + 1), lower.unflatten(dim, sizes).amax(dim + 1)
    empty = low > high  # a group of outliers alone
    return low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0), place


def _filled(x: torch.Tensor, place: torch.Tensor, fmt: Format, value: float) -> torch.Tensor:
    """A copy of x [B, H, T, D] with one value at all positions that `place` counts."""
    B, H, T, D = x.shape
    blocks = _blocks(x, fmt).clone().scatter_(2, place, value)
    return blocks.view(B, -1, H, fmt.block, D).transpose(1, 2).reshape(x.shape)


def split_extremes(
    tokens: torch.Tensor, slots: int, about: Literal["median", "mean"] = "median"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Part each vector's extremes from the rest: half the slots at either end, an odd one where it
    lies farther out.

    Args:
        tokens: [..., W] float32.
        slots: outliers N, 1 <= N <= W / 2.
        about: what an odd one is far from.

    Returns:
        (low, high, index): range of the remaining elements [...], and positions of the outliers
        [..., N] int64.
    """
    upper = lower = tokens
    taken = []
    if half := slots // 2:
        high_index = tokens.topk(half, dim=-1).indices
        # Masking what is taken keeps the two ends disjoint where values tie.
        upper = tokens.scatter(-1, high_index, _INF)
        low_index = upper.topk(half, dim=-1, largest=False).indices
        lower = tokens.scatter(-1, high_index, -_INF).scatter_(-1, low_index, -_INF)
        upper.scatter_(-1, low_index, _INF)
        taken = [low_index, high_index]
    if slots % 2:
        high, low = lower.max(-1, keepdim=True), upper.min(-1, keepdim=True)
        centre = tokens.mean(-1, keepdim=True)
        if about == "median":
            centre = tokens.median(-1, keepdim=True).values
        last = torch.where(high.values - centre >= centre - low.values, high.indices, low.indices)
        taken.append(last)
        lower, upper = lower.scatter(-1, last, -_INF), upper.scatter(-1, last, _INF)
    return upper.amin(-1), lower.amax(-1), torch.cat(taken, dim=-1)


def store_range(
    low: torch.Tensor, high: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero) of a range as they are stored: half width and centre, rounded to `dtype`."""
    limit = torch.finfo(dtype).max
    scale, zero = (high - low) / 2, (high + low) / 2
    return scale.clamp(max=limit).to(dtype), zero.clamp(-limit, limit).to(dtype)
