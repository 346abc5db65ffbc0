"""The shapes at which encode_pack's kernels are compiled ahead of time."""

from __future__ import annotations

from typing import Any

import torch

from kvsmith.kernels.aot import Variant
from kvsmith.kernels.format import Format


def encode_variants() -> list[Variant]:
    """Variants of encode_kernel."""
    half = torch.float16
    keys = [Format(b, "channel", 0, 10, r, half) for b in (2, 4) for r in ("threshold", "error")]
    values = [Format(b, "token", 0, 10, "extremes", half) for b in (2, 3, 4)]
    plain = [Format(b, "token", 0, 0, "none", half) for b in range(1, 9)]
    grouped = [Format(b, a, 32, 0, "none", half, 32) for b in (2, 4) for a in ("channel", "token")]
    wide = [Format(4, "token", 0, 41, "extremes", half), Format(3, "channel", 0, 41, "error", half)]
    cases = [(f, 8, 128, "bf16") for f in keys + values + plain + grouped]
    cases += [(f, 32, 128, "fp16") for f in wide]
    cases += [(values[0], 8, 80, "fp16"), (keys[0], 4, 96, "fp32"), (grouped[1], 2, 256, "bf16")]
    found = [_encode_variant(*case) for case in cases]
    # Before a low-rank term, which is found from what codes and outliers leave.
    return found + [
        _encode_variant(f, 8, 128, "bf16", True) for f in (keys[3], values[0], *grouped)
    ]


def _encode_variant(fmt: Format, heads: int, dim: int, dtype: str, left: bool = False) -> Variant:
    from kvsmith.kernels.encode_pack.triton import encode_kernel, encode_shape, encode_warps

    shape = encode_shape(fmt, heads, dim)
    signature: dict[str, str] = {}
    for name in encode_kernel.arg_names:
        if name in shape or name in ("LOW", "LEFT"):
            continue
        signature[name] = "i32:16" if name.startswith("s_") else "i32"
        if name.startswith("p_"):
            signature[name] = "*fp32:16"
    signature |= {"p_x": f"*{dtype}:16", "p_codes": "*u8:16", "p_place": "*i32:16"}
    signature |= {"p_scale": "*fp16:16", "p_zero": "*fp16:16", "p_value": "*fp16:16"}
    signature |= {"p_count": "*i32:16"}
    low = {"fp16": 13, "bf16": 16, "fp32": 0}[dtype]
    name = f"{heads}x{dim} {dtype} {fmt.bits} bits {fmt.axis} {fmt.group} {fmt.outliers}"
    flags = {"LOW": low, "LEFT": left}
    name += " and what is left" if left else ""
    warps = encode_warps(shape)
    return Variant("encode_pack", name, encode_kernel, signature, shape | flags, warps)


def order_variants() -> list[Variant]:
    """Variants of order_kernel."""
    from kvsmith.kernels.encode_pack.triton import ORDER_WARPS, order_kernel, order_shape

    found = []
    for heads, slots, index in ((8, 10, "i16"), (32, 41, "i16"), (2, 1, "u8")):
        fmt = Format(4, "token", 0, slots, "extremes", torch.float16)
        sizes: dict[str, Any] = order_shape(fmt, heads, 128)
        signature = {
            n: "*i32:16" if n.startswith("p_") else "i32"
            for n in order_kernel.arg_names
            if n not in sizes
        }
        signature |= {"p_list": "*fp16:16", "p_value": "*fp16:16"}
        signature |= {"p_index": f"*{index}:16", "p_start": f"*{index}:16"}
        name = f"order {heads}x128 {slots} slots {index}"
        found.append(Variant("encode_pack", name, order_kernel, signature, sizes, ORDER_WARPS))
    return found
