"""Definition of decode in plain torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvsmith.kernels.format import Format, Tables
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
        _add_outliers(x, tensors["index"], tensors["value"])
    return x


def expand_range(values: torch.Tensor, shape: torch.Size, fmt: Format) -> torch.Tensor:
    """Broadcast stored ranges to [B, H, T, D]."""
    if fmt.axis == "channel":
        return values.repeat_interleave(fmt.group, dim=2)
    if fmt.group:
        return values.repeat_interleave(fmt.group, dim=3)
    return values[:, None, :, None]


def _add_outliers(x: torch.Tensor, index: torch.Tensor, value: torch.Tensor) -> None:
    """Add the corrections in place: index head * D + channel of token t is element (head, t,
    channel).
    """
    B, _, T, D = x.shape
    position = index.long() if index.dtype == torch.uint8 else index.long() & 0xFFFF
    token = torch.arange(T, device=x.device)[:, None]
    flat = (position // D * T + token) * D + position % D  # [B, T, N]
    x.view(B, -1).scatter_add_(1, flat.view(B, -1), value.float().view(B, -1))
