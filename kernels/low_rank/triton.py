"""Device functions that add the low-rank term to a tile of attention, one column at a time.

A column of A holds the block's tokens, one of B the head's channels; both are read once for a tile
and cost as many operations a token as a column has elements to meet: M for the queries' M rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _elements(
    p_base, row, o, m_o,
    OFFSET: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Elements o of column `row` of N, float32, without its scale; BITS 0 for STORE."""
    if BITS == 0:
        p_row = (p_base + OFFSET).to(tl.pointer_type(STORE)) + row * N
        return tl.load(p_row + o, mask=m_o, other=0.0).to(tl.float32)
    SIZE: tl.constexpr = N * BITS // 8
    byte = tl.load(p_base + OFFSET + row * SIZE + o % SIZE, mask=m_o, other=0).to(tl.int32)
    code = (byte >> (o // SIZE * BITS)) & ((1 << BITS) - 1)
    # Levels are (2 code + 1) / 2^bits - 1.
    value = (2 * code + 1).to(tl.float32) * (1.0 / (1 << BITS)) - 1.0
    return tl.where(m_o, value, 0.0)


@triton.jit
def _scale(p_base, row, OFFSET: tl.constexpr, BITS: tl.constexpr, STORE: tl.constexpr):
    """What a column of quantized factors is multiplied by; 1 for others."""
    if BITS == 0:
        return 1.0
    return tl.load((p_base + OFFSET).to(tl.pointer_type(STORE)) + row).to(tl.float32)


@triton.jit
def add_logits(
    logits, q1, q2, channel, p_base, i_h, i_t, tile,
    RANK: tl.constexpr, BITS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SCALE: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """logits [T, M] + A (q B)^T for page tokens i_t + `tile`, q in halves [HALF, M] with channels
    `channel` and those D / 2 above.
    """
    inside = channel < D // 2
    for i in tl.static_range((T + BLOCK - 1) // BLOCK):
        o_t = i_t % BLOCK + tile - i * BLOCK
        m_t = (o_t >= 0) & (o_t < BLOCK)
        first = (i_h * (PAGE // BLOCK) + i_t // BLOCK + i) * RANK
        for r in range(RANK):
            left = _elements(p_base, first + r, o_t, m_t, LEFT, BLOCK, BITS, STORE)
            one = _elements(p_base, first + r, channel, inside, RIGHT, D, BITS, STORE)
            two = _elements(p_base, first + r, channel + D // 2, inside, RIGHT, D, BITS, STORE)
            inner = tl.sum(q1 * one[:, None] + q2 * two[:, None], 0)
            inner *= _scale(p_base, first + r, SCALE, BITS, STORE)
            logits += left[:, None] * inner[None, :]
    return logits


@triton.jit
def add_values(
    acc, p, channel, p_base, i_h, i_t, tile,
    RANK: tl.constexpr, BITS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SCALE: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """acc [rows, M] with channels `channel` + B (A^T p) for weights p [T, M] of page tokens i_t +
    `tile`.
    """
    for i in tl.static_range((T + BLOCK - 1) // BLOCK):
        o_t = i_t % BLOCK + tile - i * BLOCK
        m_t = (o_t >= 0) & (o_t < BLOCK)
        first = (i_h * (PAGE // BLOCK) + i_t // BLOCK + i) * RANK
        for r in range(RANK):
            left = _elements(p_base, first + r, o_t, m_t, LEFT, BLOCK, BITS, STORE)
            right = _elements(p_base, first + r, channel, channel < D, RIGHT, D, BITS, STORE)
            inner = tl.sum(p * left[:, None], 0) * _scale(p_base, first + r, SCALE, BITS, STORE)
            acc += right[:, None] * inner[None, :]
    return acc
