"""Definition of decode in plain torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvsmith.kernels.format import Format, Tables, unsigned
from kvsmith.kernels.pack.api import unpack


def decode(
    tensors: Mapping[str, torch.Tensor], fmt: Format, tables: Tables, dim: int
) -> torch.Tensor:
    """See `api.decode`."""
    codes = unpack(tensors["codes"], fmt.bits, dim)
    x = tables.lut[codes.int()]  # [B, H, T, D]
    if "scale" in tensors:
        x *= expand_range(tensors["scale"].float(), x.shape, fmt)
        x += expand_range(tensors["zero"].float(), x.shape, fmt)
    else:
        assert tables.scale is not None and tables.zero is not None
        x = torch.addcmul(tables.zero[:, None], x, tables.scale[:, None])
    if fmt.slots:
        _add_outliers(x, tensors, fmt.block)
    return x


def expand_range(values: torch.Tensor, shape: torch.Size, fmt: Format) -> torch.Tensor:
    """Broadcast stored ranges to [B, H, T, D]."""
    if fmt.axis == "channel":
        return values.repeat_interleave(fmt.group, dim=2)
    if fmt.group:
        return values.repeat_interleave(fmt.group, dim=3)
    return values[:, None, :, None]


def _add_outliers(x: torch.Tensor, tensors: Mapping[str, torch.Tensor], block: int) -> None:
    """Add the corrections in place."""
    B, _, T, D = x.shape
    index, ends = unsigned(tensors["index"]), unsigned(tensors["start"])[..., 1:].contiguous()
    place = torch.arange(index.shape[2], device=x.device).expand(index.shape).contiguous()
    head = torch.searchsorted(ends, place, right=True)
    first = torch.arange(index.shape[1], device=x.device)[:, None] * (block * D)
    flat = head * (T * D) + first + index  # [B, T / block, block * N]
    x.view(B, -1).scatter_add_(1, flat.view(B, -1), tensors["value"].float().view(B, -1))
