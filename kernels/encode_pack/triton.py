"""Triton kernels of encode_pack.

`encode_kernel` holds some tokens in registers, all heads of them where a range or the outliers span
the heads: it finds the range, codes, packs, and lists each token's outliers in the order of their
channels. `order_kernel` moves the lists of a block of tokens to their places by head.

A row of registers stands for (head, 8 runs of D / 8 channels): byte j of a plane of width w takes
one code of each of 8 / w neighbouring runs, so every plane is a reshape, a shift and a sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import triton
import triton.language as tl

from kvsmith.kernels.aot import Variant
from kvsmith.kernels.format import Format, Tables

RULES = {"none": 0, "threshold": 1, "error": 2, "extremes": 3}
# What a range spans: calibrated, a whole token, channels of a token, tokens of a channel.
CALIBRATED, TOKEN, CHANNELS, TOKENS = 0, 1, 2, 3
# Low bits of a float32 key that a half-precision input leaves constant.
LOW_BITS = {torch.float16: 13, torch.bfloat16: 16, torch.float32: 0}
LARGEST_SCAN = 4  # bits up to which edges are scanned; wider codes search them
TILE = 1024  # elements of a tile that holds several tokens
ORDER_WARPS = 4
PROGRAMS = 512  # enough to fill a large device
MOST_KEPT = 2048  # elements of calibrated ranges that stay in registers from token to token
MOST_TOKENS = 64  # of one program that has loaded calibrated ranges


@triton.jit
def _order_key(x, LOW: tl.constexpr):
    """Integers ordered as the floats are; equal for the two zeros."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> LOW


@triton.jit
def _rank_key(key, count, LOW: tl.constexpr):
    """The count-th largest key of each row, bit by bit from the top."""
    reached = tl.sum((key >= 0).to(tl.int32), 1) >= count
    found = tl.where(reached, 0, -(1 << (31 - LOW)))
    for i in range(31 - LOW):
        bit = 1 << (30 - LOW - i)
        higher = found + bit
        reached = tl.sum((key >= higher[:, None]).to(tl.int32), 1) >= count
        found = tl.where(reached, higher, found)
    return found


@triton.jit
def _largest(key, count, LOW: tl.constexpr):
    """Which elements of each row are its `count` largest; of equal ones the first."""
    bound = _rank_key(key, count, LOW)[:, None]
    above, equal = key > bound, key == bound
    room = count - tl.sum(above.to(tl.int32), 1)
    place = tl.cumsum(equal.to(tl.int32), 1)
    return above | (equal & (place <= room[:, None]))


@triton.jit
def _extremes(x, m_x, N: tl.constexpr, W: tl.constexpr, LOW: tl.constexpr):
    """Which elements are the token's outliers: half at either end, an odd one farther out."""
    LEAST: tl.constexpr = -(1 << (31 - LOW))
    key = _order_key(x, LOW)
    taken = m_x & False
    if N > 1:
        taken = m_x & _largest(tl.where(m_x, key, LEAST), N // 2, LOW)
        rest = m_x & (taken == 0)
        taken = taken | (rest & _largest(tl.where(rest, ~key, LEAST), N // 2, LOW))
    if N % 2:
        rest = m_x & (taken == 0)
        high = tl.max(tl.where(rest, x, float("-inf")), 1)
        low = tl.min(tl.where(rest, x, float("inf")), 1)
        middle = _rank_key(tl.where(m_x, ~key, LEAST), (W - 1) // 2 + 1, LOW)
        is_middle = m_x & (~key == middle[:, None])
        median = tl.max(tl.where(is_middle, x, float("-inf")), 1)
        last = tl.where(high - median >= median - low, high, low)
        equal = rest & (x == last[:, None])
        taken = taken | (equal & (tl.cumsum(equal.to(tl.int32), 1) == 1))
    return taken


@triton.jit
def _range(x, m_x, p_out, AXIS: tl.constexpr, LIMIT: tl.constexpr):
    """(scale, zero) of what the mask leaves, rounded as they are stored."""
    high = tl.max(tl.where(m_x, x, float("-inf")), AXIS)
    low = tl.min(tl.where(m_x, x, float("inf")), AXIS)
    empty = high < low
    high, low = tl.where(empty, 0.0, high), tl.where(empty, 0.0, low)
    scale = tl.minimum((high - low) * 0.5, LIMIT)
    zero = tl.clamp((high + low) * 0.5, -LIMIT, LIMIT)
    return scale.to(p_out.dtype.element_ty), zero.to(p_out.dtype.element_ty)


@triton.jit
def _code(normal, p_edges, p_lut, BITS: tl.constexpr, SCAN: tl.constexpr):
    """(code, level): how many edges lie below, and the codebook's value there."""
    code = tl.zeros_like(normal).to(tl.int32)
    if SCAN:
        level = tl.zeros_like(normal) + tl.load(p_lut)
        for i in range((1 << BITS) - 1):
            above = normal > tl.load(p_edges + i)
            code += above.to(tl.int32)
            level = tl.where(above, tl.load(p_lut + i + 1), level)
    else:
        for i in tl.static_range(BITS):
            step = 1 << (BITS - 1 - i)
            code += tl.where(normal > tl.load(p_edges + code + (step - 1)), step, 0)
        level = tl.load(p_lut + code)
    return code, level


@triton.jit
def _store_plane(
    code, p_codes, s_h, s_t, i_t, i_h, T, H,
    LOW: tl.constexpr, WIDTH: tl.constexpr, BASE: tl.constexpr,
    TP: tl.constexpr, HP: tl.constexpr, RUN: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Pack one plane of the codes [TP, HP * 8 * RP] and store its bytes."""
    SHARE: tl.constexpr = 8 // WIDTH
    part = (code >> LOW) & ((1 << WIDTH) - 1)
    part = tl.reshape(part, (TP * HP, SHARE, WIDTH * RP))
    packed = tl.sum(part << (tl.arange(0, SHARE) * WIDTH)[None, :, None], 1)
    o_row, o_byte = tl.arange(0, TP * HP), tl.arange(0, WIDTH * RP)
    t, h = i_t + o_row // HP, i_h + o_row % HP
    p_row = p_codes + h.to(tl.int64) * s_h + t.to(tl.int64) * s_t + BASE
    m_row = (t < T) & (h < H)
    m_byte = o_byte % RP < RUN
    p_byte = p_row[:, None] + (o_byte // RP * RUN + o_byte % RP)[None, :]
    tl.store(p_byte, packed.to(tl.uint8), mask=m_row[:, None] & m_byte[None, :])


@triton.jit
def encode_kernel(
    p_x, s_xb, s_xh, s_xt, p_lut, p_edges, p_tscale, p_tzero,
    p_codes, s_cb, s_ch, s_ct, p_scale, p_zero, s_rb, s_rh, s_rt,
    p_place, p_value, p_count, p_left, T, H, PER,
    BITS: tl.constexpr, RANGE: tl.constexpr, RULE: tl.constexpr, N: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    TP: tl.constexpr, HP: tl.constexpr, RP: tl.constexpr,
    LOW: tl.constexpr, LIMIT: tl.constexpr, SCAN: tl.constexpr, KEEP: tl.constexpr,
    PACK: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """Tokens [first, first + PER) of one row, TP at a time; HP heads from i_h on."""
    RUN: tl.constexpr = D // 8
    WP: tl.constexpr = HP * 8 * RP
    i_b, i_h = tl.program_id(2).to(tl.int64), tl.program_id(1) * HP
    first = tl.program_id(0) * PER
    o_w = tl.arange(0, WP)
    h, run = i_h + o_w // (8 * RP), o_w % (8 * RP)
    channel = run // RP * RUN + run % RP
    m_w = (h < H) & (run % RP < RUN)
    o_table = h * D + channel
    if RANGE == 0 and KEEP:
        scale = tl.load(p_tscale + o_table, mask=m_w, other=1.0)[None, :]
        zero = tl.load(p_tzero + o_table, mask=m_w, other=0.0)[None, :]
    p_channel = p_x + i_b * s_xb + h.to(tl.int64) * s_xh + channel
    for i_t in range(first, tl.minimum(first + PER, T), TP):
        o_t = i_t + tl.arange(0, TP)
        m_t = (o_t < T) & (tl.arange(0, TP) < GROUP) if RANGE == 3 else o_t < T
        m_x = m_t[:, None] & m_w[None, :]
        p_tile = p_channel[None, :] + (o_t.to(tl.int64) * s_xt)[:, None]
        x = tl.load(p_tile, mask=m_x, other=0.0).to(tl.float32)
        if RANGE == 0 and not KEEP:
            scale = tl.load(p_tscale + o_table, mask=m_w, other=1.0)[None, :]
            zero = tl.load(p_tzero + o_table, mask=m_w, other=0.0)[None, :]
        if RULE == 3:
            taken = _extremes(x, m_x, N, W, LOW)
            m_range = m_x & (taken == 0)
        else:
            m_range = m_x
        if RANGE == 1:
            b_scale, b_zero = _range(x, m_range, p_scale, 1, LIMIT)
            o_range = i_b * s_rb + o_t.to(tl.int64) * s_rt
            tl.store(p_scale + o_range, b_scale, mask=m_t)
            tl.store(p_zero + o_range, b_zero, mask=m_t)
            scale, zero = b_scale.to(tl.float32)[:, None], b_zero.to(tl.float32)[:, None]
        if RANGE == 2:
            # One head a program.
            scale, zero = tl.zeros_like(x), tl.zeros_like(x)
            o_range = i_b * s_rb + i_h.to(tl.int64) * s_rh + o_t.to(tl.int64) * s_rt
            for g in range(D // GROUP):
                m_g = (channel // GROUP == g)[None, :] & m_x
                b_scale, b_zero = _range(x, m_g, p_scale, 1, LIMIT)
                tl.store(p_scale + o_range + g, b_scale, mask=m_t)
                tl.store(p_zero + o_range + g, b_zero, mask=m_t)
                scale = tl.where(m_g, b_scale.to(tl.float32)[:, None], scale)
                zero = tl.where(m_g, b_zero.to(tl.float32)[:, None], zero)
        if RANGE == 3:
            b_scale, b_zero = _range(x, m_x, p_scale, 0, LIMIT)
            o_group = i_t // GROUP + tl.zeros((WP,), tl.int64)
            o_range = i_b * s_rb + h.to(tl.int64) * s_rh + o_group * s_rt + channel
            tl.store(p_scale + o_range, b_scale, mask=m_w)
            tl.store(p_zero + o_range, b_zero, mask=m_w)
            scale, zero = b_scale.to(tl.float32)[None, :], b_zero.to(tl.float32)[None, :]
        flat = tl.zeros_like(x) + scale == 0
        normal = tl.div_rn(x - zero, tl.where(flat, 1.0, tl.zeros_like(x) + scale))
        normal = tl.where(flat, 0.0, normal)
        code, level = _code(normal, p_edges, p_lut, BITS, SCAN)
        error = x - (level * scale + zero)
        left = error
        end = tl.minimum(T, i_t + GROUP) if RANGE == 3 else T
        p_base = p_codes + i_b * s_cb
        # Planes of BITS, low bits first.
        PLANES: tl.constexpr = BITS if PACK else 0
        if PLANES == 8:
            _store_plane(code, p_base, s_ch, s_ct, i_t, i_h, end, H, 0, 8, 0, TP, HP, RUN, RP)
        if PLANES & 4:
            _store_plane(code, p_base, s_ch, s_ct, i_t, i_h, end, H, 0, 4, 0, TP, HP, RUN, RP)
        if PLANES & 2:
            _store_plane(
                code, p_base, s_ch, s_ct, i_t, i_h, end, H,
                BITS & 4, 2, (BITS & 4) * RUN, TP, HP, RUN, RP,
            )  # fmt: skip
        if PLANES & 1:
            _store_plane(
                code, p_base, s_ch, s_ct, i_t, i_h, end, H,
                BITS & 6, 1, (BITS & 6) * RUN, TP, HP, RUN, RP,
            )  # fmt: skip
        if RULE > 0:
            if RULE == 1:
                excess = tl.abs(normal)
                taken = _largest(tl.where(m_x, _order_key(excess, 0), -1), N, 0) & m_x
                error = error * (excess > 1).to(tl.float32)
            if RULE == 2:
                taken = _largest(tl.where(m_x, _order_key(tl.abs(error), 0), -1), N, 0) & m_x
            slot = tl.cumsum(taken.to(tl.int32), 1) - 1
            value = tl.clamp(error, -LIMIT, LIMIT).to(p_value.dtype.element_ty)
            left = tl.where(taken, left - value.to(tl.float32), left)
            p_list = (i_b * T + o_t.to(tl.int64))[:, None] * N + slot
            o_place = tl.zeros_like(slot) + (h * D + channel)[None, :]
            tl.store(p_place + p_list, o_place, mask=taken)
            tl.store(p_value + p_list, value, mask=taken)
            count = tl.sum(tl.reshape(taken.to(tl.int32), (TP, HP, 8 * RP)), 2)
            o_h = tl.arange(0, HP)
            p_counts = (i_b * T + o_t.to(tl.int64))[:, None] * H + o_h[None, :]
            tl.store(p_count + p_counts, count, mask=m_t[:, None] & (o_h < H)[None, :])
        if LEFT:
            o_row = ((i_b * H + h)[None, :] * T + o_t[:, None]) * D
            tl.store(p_left + o_row + channel[None, :], left, mask=m_x)


@triton.jit
def order_kernel(
    p_place, p_list, p_count, p_index, s_ib, s_it, p_value, s_vb, s_vt, p_start, s_sb, s_st,
    T, H, N, BLOCK: tl.constexpr, D: tl.constexpr, BP: tl.constexpr, HP: tl.constexpr,
    NC: tl.constexpr,
):  # fmt: skip
    """Move the corrections of one block of tokens to their places by head, token and channel."""
    i_b, i_n = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    o_t, o_h = tl.arange(0, BP), tl.arange(0, HP)
    token = i_b * T + i_n * BLOCK + o_t
    m_count = (o_t < BLOCK)[:, None] & (o_h < H)[None, :]
    count = tl.load(p_count + token[:, None] * H + o_h[None, :], mask=m_count, other=0)
    total = tl.sum(count, 0)
    start = tl.cumsum(total, 0) - total
    p_first = p_start + i_b * s_sb + i_n * s_st
    tl.store(p_first + o_h, start.to(p_start.dtype.element_ty), mask=o_h < H)
    tl.store(p_first + H, (BLOCK * N).to(p_start.dtype.element_ty))
    # An entry's place: the head's first, its earlier tokens, its rank among the token's own.
    earlier = tl.cumsum(count, 0) - count
    shift = start[None, :] + earlier - (tl.cumsum(count, 1) - count)  # [BP, HP]
    for i_s in range(0, N, NC):
        slot = i_s + tl.arange(0, NC)
        m_s = (o_t < BLOCK)[:, None] & (slot < N)[None, :]
        o_s = token[:, None] * N + slot[None, :]
        place = tl.load(p_place + o_s, mask=m_s, other=0)
        value = tl.load(p_list + o_s, mask=m_s, other=0.0)
        mine = (place // D)[:, :, None] == o_h[None, None, :]
        target = slot[None, :] + tl.sum(tl.where(mine, shift[:, None, :], 0), 2)
        index = o_t[:, None] * D + place % D
        p_to = p_index + i_b * s_ib + i_n * s_it + target
        tl.store(p_to, index.to(p_index.dtype.element_ty), mask=m_s)
        tl.store(p_value + i_b * s_vb + i_n * s_vt + target, value, mask=m_s)


def encode_warps(shape: Mapping[str, int]) -> int:
    """Warps that hold a tile of encode_kernel without spilling."""
    elements = shape["TP"] * shape["HP"] * 8 * shape["RP"]
    return min(max(elements // 256, 1), 8)


def _span(fmt: Format) -> int:
    """What a range spans."""
    if fmt.axis == "channel":
        return TOKENS if fmt.group else CALIBRATED
    return CHANNELS if fmt.group else TOKEN


def apart(fmt: Format, heads: int, dim: int) -> bool:
    """Whether outliers get a launch of their own: ranges, codes and errors of a wide token do not
    fit into registers together, and codes need no other head.
    """
    return fmt.slots > 0 and _span(fmt) == CALIBRATED and heads * dim > MOST_KEPT


def encode_shape(fmt: Format, heads: int, dim: int) -> dict[str, int]:
    """Constants of encode_kernel that follow from the layout and the heads."""
    span, RP = _span(fmt), triton.next_power_of_2(dim // 8)
    alone = fmt.slots == 0 and span != TOKEN  # a head needs nothing of the others
    HP = 1 if alone else triton.next_power_of_2(heads)
    split, TP = apart(fmt, heads, dim), 16
    if span == TOKENS:
        TP = triton.next_power_of_2(fmt.group)
    elif not alone:
        # Narrow tokens share a tile; outliers are stored by whole blocks, which it must divide.
        TP = min(max(TILE // (HP * 8 * RP), 1), fmt.block & -fmt.block)
    return {
        "BITS": fmt.bits, "RANGE": span, "RULE": RULES[fmt.outliers], "N": fmt.slots,
        "GROUP": fmt.group, "D": dim, "W": heads * dim, "TP": TP, "HP": HP, "RP": RP,
        "LIMIT": torch.finfo(fmt.store).max, "KEEP": HP * 8 * RP <= MOST_KEPT,
        "SCAN": fmt.bits <= (2 if split else LARGEST_SCAN), "PACK": not split,
    }  # fmt: skip


def order_shape(fmt: Format, heads: int, dim: int) -> dict[str, int]:
    """Constants of order_kernel."""
    BP, HP = triton.next_power_of_2(fmt.block), triton.next_power_of_2(heads)
    NC = max(1, min(16, 8192 // (BP * HP)))
    return {"BLOCK": fmt.block, "D": dim, "BP": BP, "HP": HP, "NC": NC}


def encode_pack(
    x: torch.Tensor, fmt: Format, tables: Tables, out: Mapping[str, torch.Tensor],
    left: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """See `api.encode_pack`; `out` holds every tensor of the result."""
    B, H, T, D = x.shape
    if x.stride(3) != 1:
        x = x.contiguous()
    if apart(fmt, H, D):
        encode_pack(x, replace(fmt, slots=0, outliers="none"), tables, out)
    shape = encode_shape(fmt, H, D)
    TP, HP = shape["TP"], shape["HP"]
    step = fmt.group if shape["RANGE"] == TOKENS else TP
    per = step
    if shape["RANGE"] == CALIBRATED and shape["KEEP"]:
        # Many tokens a program spare the tables, many programs fill the device.
        wanted = B * T * triton.cdiv(H, HP) // PROGRAMS
        per = min(max(wanted // step * step, step), max(MOST_TOKENS, step))
    lists = _lists(x, fmt)
    scale, zero = out.get("scale", tables.lut), out.get("zero", tables.lut)
    codes = out["codes"]
    grid = (triton.cdiv(T, per), triton.cdiv(H, HP), B)
    encode_kernel[grid](
        x, *x.stride()[:3], tables.lut, tables.edges,
        tables.lut if tables.scale is None else tables.scale,
        tables.lut if tables.zero is None else tables.zero,
        codes, *codes.stride()[:3], scale, zero, *_range_strides(scale, shape["RANGE"]),
        *lists, tables.lut if left is None else left, T, H, per, **shape,
        LOW=LOW_BITS[x.dtype], LEFT=left is not None,
        num_warps=encode_warps(shape), enable_fp_fusion=False,
    )  # fmt: skip
    if fmt.slots:
        _order(lists, fmt, x.shape, out)


def _order(
    lists: tuple[torch.Tensor, ...],
    fmt: Format,
    shape: torch.Size,
    out: Mapping[str, torch.Tensor],
) -> None:
    B, H, T, D = shape
    index, value, start = out["index"], out["value"], out["start"]
    sizes = order_shape(fmt, H, D)
    order_kernel[(T // fmt.block, B)](
        *lists, index, *index.stride()[:2], value, *value.stride()[:2],
        start, *start.stride()[:2], T, H, fmt.slots, **sizes,
        num_warps=ORDER_WARPS,
    )  # fmt: skip


def _lists(x: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for each token's outliers (place, value) and how many of them a head has."""
    B, H, T, _ = x.shape
    lists, counts = ((B, T, fmt.slots), (B, T, H)) if fmt.slots else ((1,), (1,))
    place, value = x.new_empty(lists, dtype=torch.int32), x.new_empty(lists, dtype=fmt.store)
    return place, value, x.new_empty(counts, dtype=torch.int32)


def _range_strides(scale: torch.Tensor, span: int) -> tuple[int, int, int]:
    """Elements from row to row, head to head, and token (or group of tokens) to the next."""
    if span == CALIBRATED:
        return 0, 0, 0
    s = scale.stride()
    return (s[0], 0, s[1]) if span == TOKEN else (s[0], s[1], s[2])


def variants() -> list[Variant]:
    """Every rule and range at the shapes of published models, and every width of code."""
    from kvsmith.kernels.encode_pack.variants import encode_variants, order_variants

    return encode_variants() + order_variants()
