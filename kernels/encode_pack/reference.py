"""Definition of encode_pack in plain torch; the formula stands in `api.py`."""

from __future__ import annotations

import torch

from kvsmith.kernels.decode.reference import expand_range
from kvsmith.kernels.format import Format, Tables, index_dtype
from kvsmith.kernels.pack.api import pack

_INF = float("inf")


def encode_pack(x: torch.Tensor, fmt: Format, tables: Tables) -> dict[str, torch.Tensor]:
    """See `api.encode_pack`."""
    x = x.float()
    B, H, T, D = x.shape
    tensors: dict[str, torch.Tensor] = {}
    index = None
    if fmt.group == 0 and fmt.axis == "channel":
        assert tables.scale is not None and tables.zero is not None
        scale, zero = tables.scale[:, None], tables.zero[:, None]  # [H, 1, D]
    else:
        low, high, index = online_range(x, fmt)
        tensors["scale"], tensors["zero"] = store_range(low, high, fmt.store)
        scale = expand_range(tensors["scale"].float(), x.shape, fmt)
        zero = expand_range(tensors["zero"].float(), x.shape, fmt)
    normal = ((x - zero) / scale).masked_fill(scale == 0, 0.0)
    codes = torch.bucketize(normal, tables.edges, out_int32=True)
    tensors["codes"] = pack(codes.to(torch.uint8), fmt.bits)
    if fmt.slots:
        error = (x - (tables.lut[codes] * scale + zero)).transpose(1, 2).reshape(B, T, H * D)
        if fmt.outliers == "threshold":
            excess = normal.abs().transpose(1, 2).reshape(B, T, H * D)
            top = excess.topk(fmt.slots, dim=-1)
            index, value = top.indices, error.gather(-1, top.indices) * (top.values > 1)
        else:
            if fmt.outliers == "error":
                index = error.abs().topk(fmt.slots, dim=-1).indices
            assert index is not None
            value = error.gather(-1, index)
        tensors |= _by_head(index, value, fmt, H, D)
    return tensors


def _by_head(
    index: torch.Tensor, value: torch.Tensor, fmt: Format, heads: int, dim: int
) -> dict[str, torch.Tensor]:
    """Order corrections [B, T, N] at head * D + channel as they are stored."""
    B, T, N = index.shape
    block, area = fmt.block, fmt.block * dim
    token = torch.arange(T, device=index.device)[:, None] % block
    place = index // dim * area + token * dim + index % dim
    place, order = place.view(B, T // block, block * N).sort(dim=-1)
    value = value.reshape(place.shape).gather(-1, order)
    firsts = torch.arange(heads + 1, device=index.device) * area
    start = torch.searchsorted(place, firsts.expand(B, T // block, -1).contiguous())
    limit = torch.finfo(fmt.store).max
    return {
        "index": (place % area).to(index_dtype(area - 1)),
        "value": value.clamp(-limit, limit).to(fmt.store),
        "start": start.to(index_dtype(block * N)),
    }


def online_range(
    x: torch.Tensor, fmt: Format
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Smallest and largest element of every range, and the outliers left out of them.

    Args:
        x: [B, H, T, D] float32.
        fmt: the layout.

    Returns:
        (low, high, index): the first two shaped like the stored range; index [B, T, N] int64 or
        None.
    """
    B, H, T, D = x.shape
    if fmt.axis == "channel":
        groups = x.unflatten(2, (T // fmt.group, fmt.group))
        return groups.amin(3), groups.amax(3), None
    if fmt.group:
        groups = x.unflatten(3, (D // fmt.group, fmt.group))
        return groups.amin(4), groups.amax(4), None
    tokens = x.transpose(1, 2).reshape(B, T, H * D)
    if not fmt.slots:
        return tokens.amin(-1), tokens.amax(-1), None
    return split_extremes(tokens, fmt.slots)


def split_extremes(
    tokens: torch.Tensor, slots: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Part each token's extremes from the rest: half the slots at either end, an odd one where it
    lies farther out.

    Args:
        tokens: [..., W] float32.
        slots: outliers N, 1 <= N <= W / 2.

    Returns:
        (low, high, index): range of the remaining elements [...], and positions of the outliers
        [..., N] int64.
    """
    half = slots // 2
    high_index = tokens.topk(half, dim=-1).indices
    # Masking what is taken keeps the two ends disjoint where values tie.
    upper = tokens.scatter(-1, high_index, _INF)
    low_index = upper.topk(half, dim=-1, largest=False).indices
    lower = tokens.scatter(-1, high_index, -_INF).scatter(-1, low_index, -_INF)
    upper = upper.scatter(-1, low_index, _INF)
    index = torch.cat([low_index, high_index], dim=-1)
    if slots % 2:
        high, low = lower.max(-1, keepdim=True), upper.min(-1, keepdim=True)
        median = tokens.median(-1, keepdim=True).values
        last = torch.where(high.values - median >= median - low.values, high.indices, low.indices)
        index = torch.cat([index, last], dim=-1)
        lower, upper = lower.scatter(-1, last, -_INF), upper.scatter(-1, last, _INF)
    return upper.amin(-1), lower.amax(-1), index


def store_range(
    low: torch.Tensor, high: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero) of a range as they are stored: half width and centre, rounded to `dtype`."""
    limit = torch.finfo(dtype).max
    scale, zero = (high - low) / 2, (high + low) / 2
    return scale.clamp(max=limit).to(dtype), zero.clamp(-limit, limit).to(dtype)
