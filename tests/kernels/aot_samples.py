"""Kernels that are fine, that spill, and that need too much shared memory."""

import json
import sys
from dataclasses import asdict

import triton
import triton.language as tl

from kvsmith.kernels.aot import TARGETS, Variant, compile_all


@triton.jit
def double(x, y, n, S: tl.constexpr):
    o = tl.program_id(0) * S + tl.arange(0, S)
    tl.store(y + o, 2 * tl.load(x + o, mask=o < n, other=0.0), mask=o < n)


@triton.jit
def centred(x, y, S: tl.constexpr):
    """The whole row lives until its sum is known."""
    o = tl.arange(0, S)
    row = tl.load(x + o)
    tl.store(y + o, row - tl.sum(row, 0))


@triton.jit
def matmul(x, y, n, S: tl.constexpr):
    """Each stage of the loop keeps two tiles in shared memory."""
    o = tl.arange(0, S)
    total = tl.zeros((S, S), tl.float32)
    for i in range(0, n, S):
        a = tl.load(x + o[:, None] * n + (i + o)[None, :])
        b = tl.load(x + (i + o)[:, None] * n + o[None, :])
        total = tl.dot(a, b, total)
    tl.store(y + o[:, None] * S + o[None, :], total)


POINTERS = {"x": "*fp32:16", "y": "*fp32:16"}
HALVES = {"x": "*fp16:16", "y": "*fp32:16", "n": "i32:16"}
VARIANTS = [
    Variant("sample", "fine", double, POINTERS | {"n": "i32"}, {"S": 1024}),
    Variant("sample", "spills", centred, POINTERS, {"S": 32768}, num_warps=1),
    Variant("sample", "shared", matmul, HALVES, {"S": 128}, 8, num_stages=6),
]


if __name__ == "__main__":
    pairs = [(v, t) for v in VARIANTS for t in TARGETS if v.name == "fine" or t.name in sys.argv]
    json.dump([asdict(r) | {"fault": r.fault} for r in compile_all(pairs)], sys.stdout)
