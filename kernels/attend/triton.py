"""Device functions of attention: online softmax, what shapes logits, tiles of dense tokens; and the
kernel that merges partials.

Logits are [tokens, queries]: tokens and channels fill the rows of tensor cores, where the few
queries of a decoding step would leave most of them empty. Tiles as in `decode/triton.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TAU = tl.constexpr(6.283185307179586)


@triton.jit
def operand(x, dtype: tl.constexpr, WIDE: tl.constexpr):
    """x as a factor of a matrix product; the interpreter cannot multiply bfloat16 (`WIDE`)."""
    y = x.to(dtype)
    if WIDE:
        y = y.to(tl.float32)
    return y


@triton.jit
def cos_sin(turns):
    """cos, sin of float32 angles in revolutions: an eighth of a turn by polynomials, to 1e-7.

    The library's functions keep a table on the stack for large angles, which never come here.
    """
    quarter = tl.floor(turns * 4.0 + 0.5)
    x = (turns - quarter * 0.25) * TAU
    y = x * x
    s = x + x * y * (-1.6666667e-1 + y * (8.3333333e-3 + y * (-1.9841270e-4 + y * 2.7557319e-6)))
    c = 1.0 + y * (-0.5 + y * (4.1666667e-2 + y * (-1.3888889e-3 + y * 2.4801587e-5)))
    turned = quarter.to(tl.int32) & 3
    odd = turned & 1 != 0
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    return tl.where((turned + 1) & 2 != 0, -cos, cos), tl.where(turned & 2 != 0, -sin, sin)


@triton.jit
def turn(position, turns):
    """cos, sin float32 of `position` times float64 `turns`, reduced before it is float32."""
    angle = position.to(tl.float64) * turns
    return cos_sin((angle - tl.floor(angle)).to(tl.float32))


@triton.jit
def softmax_step(m_old, total, logits, m_seen):
    """Online softmax of a tile [T, M] in base 2.

    Returns the new maximum [M], the new total, the factor on what was summed before, and weights.
    """
    logits = tl.where(m_seen, logits, float("-inf"))
    m_new = tl.maximum(m_old, tl.max(logits, 0))
    anchor = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(logits - anchor[None, :])
    fade = tl.exp2(m_old - anchor)
    return m_new, total * fade + tl.sum(p, 0), fade, p


@triton.jit
def shape_logits(logits, i_column, q_column, slope, CAP, WINDOW, HAS_CAP: tl.constexpr):
    """Soft-cap, ALiBi, base 2 of logits [T, M]; and which columns a query sees."""
    if HAS_CAP:
        logits = CAP * (2.0 * tl.sigmoid(2.0 * logits / CAP) - 1.0)
    distance = q_column[None, :] - i_column[:, None]
    logits -= slope[None, :] * distance.to(tl.float32)
    m_seen = (distance >= 0) & (distance < WINDOW)
    return logits * LOG2E, m_seen


@triton.jit
def dense_tiles(
    q1, q2, m, total, acc, p_k, p_v, p_at, p_turns, k_channel, v_channel, slot, m_slot, i_column,
    q_column, slope, rope_scale, cap, window,
    D: tl.constexpr, DV: tl.constexpr, ROPE: tl.constexpr, HAS_CAP: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Attend to T tokens of a dense window, keys before RoPE and at any positions.

    q1, q2 [HALF, M] are halves of the queries with channels `k_channel` and those D / 2 above;
    rows of acc [2 HALF, M] have channels `v_channel`.
    """
    m_k = m_slot[:, None] & (k_channel < D // 2)[None, :]
    p_row = p_k + slot[:, None] * D + k_channel[None, :]
    k1 = tl.load(p_row, mask=m_k, other=0.0)
    k2 = tl.load(p_row + D // 2, mask=m_k, other=0.0)
    dtype = k1.dtype
    if ROPE:
        # Positions count from the tile's first; only that one is turned in float64.
        origin = tl.load(p_at + tl.min(slot, 0))
        away = (tl.load(p_at + slot, mask=m_slot, other=0) - origin).to(tl.float32)
        exact = tl.load(p_turns + k_channel, mask=k_channel < D // 2, other=0.0)
        start = origin.to(tl.float64) * exact
        start = (start - tl.floor(start)).to(tl.float32)
        c, s = cos_sin(start[None, :] + away[:, None] * exact.to(tl.float32)[None, :])
        x1, x2 = k1.to(tl.float32), k2.to(tl.float32)
        k1, k2 = (x1 * c - x2 * s).to(dtype), (x2 * c + x1 * s).to(dtype)
    logits = tl.dot(operand(k1, dtype, WIDE), operand(q1, dtype, WIDE), input_precision="ieee")
    logits = tl.dot(
        operand(k2, dtype, WIDE), operand(q2, dtype, WIDE), logits, input_precision="ieee"
    )
    if ROPE:
        logits *= rope_scale
    logits, m_seen = shape_logits(logits, i_column, q_column, slope, cap, window, HAS_CAP)
    m, total, fade, p = softmax_step(m, total, logits, m_seen & m_slot[:, None])
    m_v = m_slot[None, :] & (v_channel < DV)[:, None]
    v = tl.load(p_v + slot[None, :] * DV + v_channel[:, None], mask=m_v, other=0.0)
    acc = tl.dot(
        operand(v, dtype, WIDE), operand(p, dtype, WIDE), acc * fade[None, :],
        input_precision="ieee",
    )  # fmt: skip
    return m, total, acc


@triton.jit
def merge_kernel(
    p_parts,
    p_logs,
    p_out,
    p_lse,
    parts,
    R: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a query: merge its `parts` partials, whose lse are in base 2."""
    i_bh, i_r = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, WIDTH)
    m_channel = channel < DV
    m, total = float("-inf"), 0.0
    acc = tl.zeros((WIDTH,), tl.float32)
    for i in range(0, parts):
        o_part = (i_bh * parts + i) * R + i_r
        lse = tl.load(p_logs + o_part)
        value = tl.load(p_parts + o_part * DV + channel, mask=m_channel, other=0.0)
        m_new = tl.maximum(m, lse)
        anchor = tl.where(m_new == float("-inf"), 0.0, m_new)
        fade, weight = tl.exp2(m - anchor), tl.exp2(lse - anchor)
        acc = acc * fade + value * weight
        total = total * fade + weight
        m = m_new
    whole = tl.where(total == 0.0, 1.0, total)
    o_row = i_bh * R + i_r
    tl.store(p_out + o_row * DV + channel, acc / whole, mask=m_channel)
    tl.store(p_lse + o_row, tl.where(total == 0.0, m, (m + tl.log2(whole)) * LN2))
