"""Device functions that decode a tile of tokens of one head into its two halves of channels.

Tiles are [T, HALF]: T tokens, channels j (lower) and j + D/2 (upper) for j < D/2, HALF the next
power of two. RoPE turns the two together, and bytes of 1, 2 and 4 bit planes hold both.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plane(
    p_row, m_token, D: tl.constexpr, HALF: tl.constexpr, T: tl.constexpr, WIDTH: tl.constexpr
):
    """Lower and upper codes of one plane, int32; `p_row` [T, 1] points at its first byte."""
    SIZE: tl.constexpr = (D * WIDTH + 7) // 8
    MASK: tl.constexpr = (1 << WIDTH) - 1
    if HALF * 2 == D and WIDTH < 8:
        bytes_ = tl.load(p_row + tl.arange(0, SIZE)[None, :], mask=m_token[:, None], other=0)
        # Four bits of every byte belong to the lower half, four to the upper.
        shift = tl.arange(0, 4 // WIDTH) * WIDTH
        spread = bytes_.to(tl.int32)[:, None, :] >> shift[None, :, None]
        lower = tl.reshape(spread & MASK, (T, HALF))
        upper = tl.reshape((spread >> 4) & MASK, (T, HALF))
    else:
        channel = tl.arange(0, HALF)[None, :]
        seen = m_token[:, None] & (channel < D // 2)
        lower = tl.load(p_row + channel % SIZE, mask=seen, other=0).to(tl.int32)
        lower = (lower >> (channel // SIZE * WIDTH)) & MASK
        channel += D // 2
        upper = tl.load(p_row + channel % SIZE, mask=seen, other=0).to(tl.int32)
        upper = (upper >> (channel // SIZE * WIDTH)) & MASK
    return lower, upper


@triton.jit
def codes(
    p_codes,
    o_token,
    m_token,
    D: tl.constexpr,
    HALF: tl.constexpr,
    T: tl.constexpr,
    BITS: tl.constexpr,
):
    """Lower and upper codes of tokens `o_token` [T] of one head, int32 [T, HALF]."""
    # Planes of 4, 2 and 1 bits, or one of 8.
    FIRST: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else (2 if BITS >= 2 else 1))
    REST: tl.constexpr = BITS - FIRST
    SECOND: tl.constexpr = 2 if REST >= 2 else 1
    STRIDE: tl.constexpr = (D * FIRST + 7) // 8
    EXTRA: tl.constexpr = (D * SECOND + 7) // 8 if REST else 0
    LAST: tl.constexpr = (D + 7) // 8 if REST == 3 else 0
    p_row = p_codes + o_token[:, None] * (STRIDE + EXTRA + LAST)
    lower, upper = plane(p_row, m_token, D, HALF, T, FIRST)
    if REST:
        more, above = plane(p_row + STRIDE, m_token, D, HALF, T, SECOND)
        lower |= more << FIRST
        upper |= above << FIRST
    if REST == 3:
        more, above = plane(p_row + STRIDE + EXTRA, m_token, D, HALF, T, 1)
        lower |= more << 6
        upper |= above << 6
    return lower, upper


@triton.jit
def level(code, p_lut, BITS: tl.constexpr, UNIFORM: tl.constexpr):
    """Normalised value of each code, float32."""
    C: tl.constexpr = 1 << BITS
    if UNIFORM:
        return code.to(tl.float32) * (2.0 / (C - 1)) - 1.0
    elif BITS == 1:
        return _two(code, p_lut)
    elif BITS == 2:
        return tl.where(code & 2 != 0, _two(code, p_lut + 2), _two(code, p_lut))
    elif BITS == 3:
        # A tree of selects: no memory.
        low = tl.where(code & 2 != 0, _two(code, p_lut + 2), _two(code, p_lut))
        high = tl.where(code & 2 != 0, _two(code, p_lut + 6), _two(code, p_lut + 4))
        return tl.where(code & 4 != 0, high, low)
    elif BITS == 4:
        table = tl.load(p_lut + tl.arange(0, C))
        return tl.gather(tl.broadcast_to(table[None, :], (code.shape[0], C)), code, 1)
    else:
        return tl.load(p_lut + code)


@triton.jit
def _two(code, p_pair):
    """The value of the lowest bit."""
    return tl.where(code & 1 != 0, tl.load(p_pair + 1), tl.load(p_pair))


@triton.jit
def range_of(
    p_values,
    i_head,
    o_token,
    m_token,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    T: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Stored scale or zero of tokens `o_token` of a page, broadcast to lower and upper [T, HALF].

    KIND "token": [PAGE]; "group": [H, PAGE, D / GROUP]; "channel": [H, PAGE / GROUP, D], where all
    tokens of the tile lie in one group.
    """
    channel = tl.arange(0, HALF)
    if KIND == "token" or (KIND == "group" and GROUP == D):
        first = o_token if KIND == "token" else i_head * PAGE + o_token
        value = tl.load(p_values + first, mask=m_token, other=0.0).to(tl.float32)
        lower = tl.broadcast_to(value[:, None], (T, HALF))
        upper = lower
    elif KIND == "group":
        p_row = p_values + (i_head * PAGE + o_token[:, None]) * (D // GROUP)
        if HALF * 2 == D:
            N: tl.constexpr = HALF // GROUP
            p_group = p_row + tl.arange(0, N)[None, :]
            few = tl.load(p_group, mask=m_token[:, None], other=0.0).to(tl.float32)
            many = tl.load(p_group + N, mask=m_token[:, None], other=0.0).to(tl.float32)
            lower = tl.reshape(tl.broadcast_to(few[:, :, None], (T, N, GROUP)), (T, HALF))
            upper = tl.reshape(tl.broadcast_to(many[:, :, None], (T, N, GROUP)), (T, HALF))
        else:
            seen = m_token[:, None] & (channel < D // 2)[None, :]
            lower = tl.load(p_row + channel[None, :] // GROUP, mask=seen, other=0.0)
            upper = tl.load(p_row + (channel + D // 2)[None, :] // GROUP, mask=seen, other=0.0)
            lower, upper = lower.to(tl.float32), upper.to(tl.float32)
    else:
        group = tl.min(o_token, 0) // GROUP
        p_row = p_values + (i_head * (PAGE // GROUP) + group) * D + channel
        inside = channel < D // 2
        one = tl.load(p_row, mask=inside, other=0.0).to(tl.float32)
        two = tl.load(p_row + D // 2, mask=inside, other=0.0).to(tl.float32)
        lower = tl.broadcast_to(one[None, :], (T, HALF))
        upper = tl.broadcast_to(two[None, :], (T, HALF))
    return lower, upper
