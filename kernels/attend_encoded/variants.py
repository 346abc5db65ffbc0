"""The shapes at which attend_encoded's kernels are compiled ahead of time.

Keys and values are stored as in bundles of our presets, with and without corrections, and as
KIVI's.
"""

from __future__ import annotations

import torch

from kvsmith.kernels.aot import Variant
from kvsmith.kernels.attend_encoded.api import Body, Logits, Rope, Side
from kvsmith.kernels.attend_encoded.launch import constants, options, power
from kvsmith.kernels.format import Factors, Format, Tables

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Query heads a KV head, head dim, dtype.
SHAPES = (
    (4, 128, "bf16"),
    (1, 128, "bf16"),
    (8, 64, "fp16"),
    (4, 80, "bf16"),
    (4, 96, "fp16"),
    (2, 256, "bf16"),
)


def attend_variants() -> list[Variant]:
    """The kernels with the argument types and constants of their launches."""
    from kvsmith.kernels.attend.triton import merge_kernel

    f16, found = torch.float16, []
    lut = torch.zeros(2)
    online, ranges = Tables(lut, lut), Tables(lut, lut, lut, lut)
    plain = Tables(lut, lut, uniform=True)
    for bits in (4, 2, 3, 8):
        nuq = (
            Format(bits, "channel", 0, 10, "error", f16),
            ranges,
            Format(bits, "token", 0, 10, "extremes", f16),
            online,
        )
        bare = (
            Format(bits, "channel", 0, 0, "none", f16),
            ranges,
            Format(bits, "token", 0, 0, "none", f16),
            online,
        )
        kivi = (
            Format(bits, "channel", 32, 0, "none", f16),
            plain,
            Format(bits, "token", 32, 0, "none", f16),
            plain,
        )
        for name, sides in (("nuq-1%", nuq), ("nuq", bare), ("kivi", kivi)):
            for group, dim, dtype in SHAPES if bits == 4 else SHAPES[:1]:
                if name == "kivi" and dim % 64:
                    continue
                k, v = Side(*sides[:2], dim), Side(*sides[2:], dim)
                title = f"{name} {bits} bit, {group} x {dim}"
                found += _both(title, k, v, group, dtype)
    gear = (
        (Format(2, "channel", 64, 2, "extremes", f16, 64, 1), plain, 128),
        (Format(2, "token", 64, 20, "extremes", f16, 64), plain, 128),
    )
    for width in (0, 4):
        k, v = (Side(*side, factors=Factors(64, 3, width, f16), rank=4) for side in gear)
        found += _both(f"gear 2 bit, factors {width or 16}", k, v, 4, "bf16", rope=False)
    merge = {
        "p_parts": "*fp32:16",
        "p_logs": "*fp32:16",
        "p_out": "*fp32:16",
        "p_lse": "*fp32:16",
        "parts": "i32",
    }
    found += [
        Variant(
            "attend_encoded",
            f"merge {dim}",
            merge_kernel,
            merge,
            {"R": 4, "DV": dim, "WIDTH": power(dim)},
        )
        for dim in (128, 80)
    ]
    return found


def _both(name: str, k: Side, v: Side, group: int, dtype: str, rope: bool = True) -> list[Variant]:
    body = Body((), None, 8, 128, 0, 0, k, v)
    return [_variant(name, body, group, dtype, b, rope) for b in ("cuda", "hip")]


def _variant(name: str, body: Body, group: int, dtype: str, backend: str, turned: bool) -> Variant:
    from kvsmith.kernels.attend_encoded.triton import attend_kernel

    rope = Rope(torch.zeros(1), 1.0, torch.zeros(1)) if turned else None
    q = torch.zeros((1, 8 * group, 1, 1), dtype=DTYPES[dtype])
    constant = constants(body, q, (4, 32), rope, Logits(1.0), backend)
    constant |= {"WIDE": False, "SHUFFLES": backend == "cuda"}
    kinds = {
        "p_q": dtype,
        "p_out": "fp32",
        "p_lse": "fp32",
        "p_pages": "i64",
        "p_counts": "i64",
        "p_first": "i64",
        "p_shift": "i64",
        "p_turns": "fp64",
        "p_sink_k": dtype,
        "p_sink_v": dtype,
        "p_sink_at": "i64",
        "p_new_k": dtype,
        "p_new_v": dtype,
        "p_new_at": "i64",
    }
    signature = {}
    for arg in attend_kernel.arg_names:
        if arg.startswith("p_"):
            signature[arg] = f"*{kinds.get(arg, 'fp32')}:16"
        elif arg in ("scale", "rope_scale", "cap"):
            signature[arg] = "fp32"
        elif arg not in constant:
            signature[arg] = "i64:16" if arg == "page_row" else "i32"
    return Variant(
        "attend_encoded",
        f"{name} {dtype}",
        attend_kernel,
        signature,
        constant,
        backend=backend,
        **options(body, group, backend),
    )
