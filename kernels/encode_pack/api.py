"""encode_pack: dense tokens -> packed codes, ranges and outliers.

    x_norm = (x - zero) / scale,  code = #{edges < x_norm},  x ~ lut[code] * scale + zero + S

S holds N corrections a token, `x - decoded`, at the outlier positions. The corrections of a block
of tokens stand together, those of head 0 first, within a head by token and channel, so that whoever
reads one head reads its own corrections alone: start[h] .. start[h + 1] - 1 are those of head h.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvsmith.errors import explain
from kvsmith.kernels.choice import Impl, preferred
from kvsmith.kernels.encode_pack import reference
from kvsmith.kernels.format import Format, Tables, index_dtype
from kvsmith.kernels.pack.api import packed_bytes


def encode_pack(
    x: torch.Tensor,
    fmt: Format,
    tables: Tables,
    *,
    out: Mapping[str, torch.Tensor] | None = None,
    left: torch.Tensor | None = None,
    impl: Impl | None = None,
) -> dict[str, torch.Tensor]:
    """Encode a block of tokens.

    Args:
        x: [B, H, T, D] float, keys or values; T a multiple of `fmt.group` where channels share
            ranges over tokens, and of `fmt.block` where there are outliers.
        fmt: the layout.
        tables: codebook and calibrated ranges, on the device of x.
        out: tensors of the result's shapes and dtypes to write to, contiguous but for their outer
            strides (views of a page); None for new ones.
        left: room for x minus its decoded value, [B, H, T, D] float32, contiguous, for a low-rank
            term; None where nobody asks.
        impl: who computes it; None for `choice.preferred`, and for the reference where triton does
            not serve the layout (see `unserved`).

    Returns:
        `codes` [B, H, T, bytes] uint8; `scale` and `zero` for online ranges, [B, T] | [B, H, T, D /
        group] | [B, H, T / group, D] store dtype; with outliers `index` [B, T / block, block * N]
        (token in the block * D + channel), `value` of the same shape, store dtype, and `start` [B,
        T / block, H + 1]. Index and start are uint8, or int16 read as unsigned.

    Raises:
        ValueError: the block does not fit the layout, or the kernel does not serve it.
    """
    if fmt.axis == "channel" and fmt.group and x.shape[2] % fmt.group:
        raise ValueError(
            explain("encode_pack", "tokens", f"a multiple of group = {fmt.group}", x.shape[2])
        )
    if fmt.slots and x.shape[2] % fmt.block:
        raise ValueError(
            explain("encode_pack", "tokens", f"a multiple of block = {fmt.block}", x.shape[2])
        )
    why = unserved(fmt, x.shape[3])
    if impl == "triton" and why:
        raise ValueError(explain("encode_pack", "layout", "one that triton serves", why))
    if impl is None:
        impl = "reference" if why else preferred(x.device)
    if impl == "reference":
        made = reference.encode_pack(x, fmt, tables, left)
        if out is None:
            return made
        for name, tensor in made.items():
            out[name].copy_(tensor)
        return dict(out)
    from kvsmith.kernels.encode_pack import triton

    result = _empty(x, fmt) if out is None else dict(out)
    triton.encode_pack(x, fmt, tables, result, left)
    return result


def unserved(fmt: Format, dim: int) -> str | None:
    """Why the kernel cannot encode a layout; None where it can.

    Args:
        fmt: the layout.
        dim: channels of a head D.
    """
    if dim % 8:
        return f"head dim {dim}, no multiple of 8"
    if fmt.slots and fmt.group:
        return f"outliers beside ranges of groups of {fmt.group}"
    return None


def _empty(x: torch.Tensor, fmt: Format) -> dict[str, torch.Tensor]:
    """Room for the result."""
    B, H, T, D = x.shape
    result = {"codes": x.new_empty((B, H, T, packed_bytes(D, fmt.bits)), dtype=torch.uint8)}
    if fmt.axis == "token" or fmt.group:
        shape: tuple[int, ...] = (B, T)
        if fmt.group:
            shape = (
                (B, H, T // fmt.group, D) if fmt.axis == "channel" else (B, H, T, D // fmt.group)
            )
        result["scale"] = x.new_empty(shape, dtype=fmt.store)
        result["zero"] = x.new_empty(shape, dtype=fmt.store)
    if fmt.slots:
        blocks, each = T // fmt.block, fmt.block * fmt.slots
        result["index"] = x.new_empty((B, blocks, each), dtype=index_dtype(fmt.block * D - 1))
        result["value"] = x.new_empty((B, blocks, each), dtype=fmt.store)
        result["start"] = x.new_empty((B, blocks, H + 1), dtype=index_dtype(each))
    return result
