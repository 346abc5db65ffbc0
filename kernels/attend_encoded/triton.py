"""The kernel: one program serves all queries of a KV head over a share of the tokens.

Grid (B, H, splits + 1). The first programs share the encoded tokens; the last one reads the dense
windows. Every program writes (out, lse); a second kernel merges them.

RoPE of keys before it: a key at p0 + t, p0 the first position of a tile, meets the query as R(p0 +
t) k. The query turned back by p0 stands in registers and moves on by one constant turn a tile; R(t)
is a table of one tile, made once a program. So no sine is evaluated for a token of the body.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvsmith.kernels.aot import Variant
from kvsmith.kernels.attend.triton import (
    cos_sin,
    dense_tiles,
    operand,
    shape_logits,
    softmax_step,
    turn,
)
from kvsmith.kernels.decode.triton import codes, level, range_of
from kvsmith.kernels.low_rank.triton import add_logits, add_values

# By torch's name.
STORE = {"torch.float16": tl.float16, "torch.bfloat16": tl.bfloat16, "torch.float32": tl.float32}


def interpreting() -> bool:
    """Whether kernels run in the interpreter."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def _corrections(
    p_base,
    i_head,
    i_block,
    OFF_INDEX: tl.constexpr,
    OFF_VALUE: tl.constexpr,
    OFF_START: tl.constexpr,
    EACH: tl.constexpr,
    H: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_START: tl.constexpr,
    STORE: tl.constexpr,
):
    """Pointers to the corrections of a block, and which of them are this head's."""
    if WIDE:
        p_index = (p_base + OFF_INDEX).to(tl.pointer_type(tl.uint16))
    else:
        p_index = p_base + OFF_INDEX
    if WIDE_START:
        p_start = (p_base + OFF_START).to(tl.pointer_type(tl.uint16))
    else:
        p_start = p_base + OFF_START
    p_value = (p_base + OFF_VALUE).to(tl.pointer_type(STORE))
    p_start += i_block * (H + 1) + i_head
    first, last = tl.load(p_start).to(tl.int32), tl.load(p_start + 1).to(tl.int32)
    return p_index + i_block * EACH, p_value + i_block * EACH, first, last


@triton.jit
def attend_kernel(
    p_q,
    p_out,
    p_lse,
    p_pages,
    p_counts,
    p_first,
    p_shift,
    p_turns,
    p_slope,
    p_k_lut,
    p_k_scale,
    p_k_zero,
    p_v_lut,
    p_v_scale,
    p_v_zero,
    p_sink_k,
    p_sink_v,
    p_sink_at,
    p_new_k,
    p_new_v,
    p_new_at,
    scale,
    rope_scale,
    cap,
    window,
    row_bytes,
    own_positions,
    splits,
    H: tl.constexpr, R: tl.constexpr, T_NEW: tl.constexpr, M: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, DV: tl.constexpr, HALF_V: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, EC: tl.constexpr,
    SINKS: tl.constexpr, ROOM: tl.constexpr, PRECISION: tl.constexpr,
    ROPE: tl.constexpr, HAS_CAP: tl.constexpr, WIDE: tl.constexpr, STORE: tl.constexpr,
    K_BITS: tl.constexpr, K_UNIFORM: tl.constexpr, K_KIND: tl.constexpr, K_GROUP: tl.constexpr,
    K_SLOTS: tl.constexpr, K_RANK: tl.constexpr, K_FACTOR_BITS: tl.constexpr,
    K_CODES: tl.constexpr, K_SCALE: tl.constexpr, K_ZERO: tl.constexpr,
    K_INDEX: tl.constexpr, K_VALUE: tl.constexpr, K_START: tl.constexpr,
    K_LEFT: tl.constexpr, K_RIGHT: tl.constexpr, K_FACTOR_SCALE: tl.constexpr,
    V_BITS: tl.constexpr, V_UNIFORM: tl.constexpr, V_KIND: tl.constexpr, V_GROUP: tl.constexpr,
    V_SLOTS: tl.constexpr, V_RANK: tl.constexpr, V_FACTOR_BITS: tl.constexpr,
    V_CODES: tl.constexpr, V_SCALE: tl.constexpr, V_ZERO: tl.constexpr,
    V_INDEX: tl.constexpr, V_VALUE: tl.constexpr, V_START: tl.constexpr,
    V_LEFT: tl.constexpr, V_RIGHT: tl.constexpr, V_FACTOR_SCALE: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    dtype = p_q.dtype.element_ty
    row, low, low_v = tl.arange(0, M), tl.arange(0, HALF), tl.arange(0, HALF_V)
    m_row, m_low, m_low_v = row < R, low < D // 2, low_v < DV // 2
    p_row = p_q + ((i_b * H + i_h) * R + row[:, None]) * D + low[None, :]
    m_q = m_row[:, None] & m_low[None, :]
    q1 = tl.load(p_row, mask=m_q, other=0.0).to(tl.float32) * scale
    q2 = tl.load(p_row + D // 2, mask=m_q, other=0.0).to(tl.float32) * scale
    slope = tl.load(p_slope + i_h * (R // T_NEW) + row // T_NEW, mask=m_row, other=0.0)
    # Body tokens [from, stop) of this cache; body token 0 lies at column SINKS.
    stop, begin = tl.load(p_counts), tl.load(p_counts + 1)
    q_column = tl.load(p_counts + 2) + row % T_NEW
    first, shift = tl.load(p_first + i_b), tl.load(p_shift + i_b)
    m = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc1 = tl.zeros((M, HALF_V), tl.float32)
    acc2 = tl.zeros((M, HALF_V), tl.float32)
    zeros = tl.zeros((M,), tl.float32)
    tile = tl.arange(0, T)
    if i_s < splits:
        tiles = tl.cdiv(stop - begin, T)
        share = tl.cdiv(tiles, splits)
        start = begin + i_s * share * T
        end = tl.minimum(stop, start + share * T)
        if ROPE:
            exact = tl.load(p_turns + low, mask=m_low, other=0.0)  # revolutions a position
            turns = exact.to(tl.float32)
            cos_t, sin_t = cos_sin(tile[:, None] * turns)
            cos_0, sin_0 = turn(start + SINKS + shift, exact)
            q1, q2 = q1 * cos_0 + q2 * sin_0, q2 * cos_0 - q1 * sin_0
            cos_n, sin_n = cos_sin(T * turns)
        if K_KIND == "calibrated":
            p_c = i_h * D + low
            ks1 = tl.load(p_k_scale + p_c, mask=m_low, other=0.0)[None, :]
            ks2 = tl.load(p_k_scale + p_c + D // 2, mask=m_low, other=0.0)[None, :]
            kz1 = tl.load(p_k_zero + p_c, mask=m_low, other=0.0)[None, :]
            kz2 = tl.load(p_k_zero + p_c + D // 2, mask=m_low, other=0.0)[None, :]
        if V_KIND == "calibrated":
            p_c = i_h * DV + low_v
            vs1 = tl.load(p_v_scale + p_c, mask=m_low_v, other=0.0)[None, :]
            vs2 = tl.load(p_v_scale + p_c + DV // 2, mask=m_low_v, other=0.0)[None, :]
            vz1 = tl.load(p_v_zero + p_c, mask=m_low_v, other=0.0)[None, :]
            vz2 = tl.load(p_v_zero + p_c + DV // 2, mask=m_low_v, other=0.0)[None, :]
        for at in range(start, end, T):
            page = tl.load(p_pages + at // PAGE - begin // PAGE)
            p_base = tl.multiple_of(page.to(tl.pointer_type(tl.uint8)), 16) + i_b * row_bytes
            o_token = at % PAGE + tile
            m_token = at + tile < end
            code1, code2 = codes(
                p_base + K_CODES, i_h * PAGE + o_token, m_token, D, HALF, T, K_BITS
            )
            k1 = level(code1, p_k_lut, K_BITS, K_UNIFORM)
            k2 = level(code2, p_k_lut, K_BITS, K_UNIFORM)
            if K_KIND != "calibrated":
                p_r = (p_base + K_SCALE).to(tl.pointer_type(STORE))
                ks1, ks2 = range_of(p_r, i_h, o_token, m_token, PAGE, D, HALF, T, K_KIND, K_GROUP)
                p_r = (p_base + K_ZERO).to(tl.pointer_type(STORE))
                kz1, kz2 = range_of(p_r, i_h, o_token, m_token, PAGE, D, HALF, T, K_KIND, K_GROUP)
            k1, k2 = k1 * ks1 + kz1, k2 * ks2 + kz2
            if ROPE:
                k1, k2 = k1 * cos_t - k2 * sin_t, k2 * cos_t + k1 * sin_t
            logits = tl.dot(
                operand(q1, dtype, WIDE), tl.trans(operand(k1, dtype, WIDE)), input_precision="ieee"
            )
            logits = tl.dot(
                operand(q2, dtype, WIDE),
                tl.trans(operand(k2, dtype, WIDE)),
                logits,
                input_precision="ieee",
            )
            if K_RANK:
                logits = add_logits(
                    logits, q1, q2, p_base, i_h, at % PAGE, tile, K_RANK, K_FACTOR_BITS,
                    K_LEFT, K_RIGHT, K_FACTOR_SCALE, BLOCK, PAGE, T, D, HALF, STORE,
                )  # fmt: skip
            if K_SLOTS:
                for i in tl.static_range(T // BLOCK):
                    p_i, p_x, e, e_end = _corrections(
                        p_base,
                        i_h,
                        at % PAGE // BLOCK + i,
                        K_INDEX,
                        K_VALUE,
                        K_START,
                        BLOCK * K_SLOTS,
                        H,
                        BLOCK * D > 256,
                        BLOCK * K_SLOTS > 255,
                        STORE,
                    )
                    while e < e_end:
                        o_e = e + tl.arange(0, EC)
                        place = tl.load(p_i + o_e, mask=o_e < e_end, other=0).to(tl.int32)
                        value = tl.load(p_x + o_e, mask=o_e < e_end, other=0.0).to(tl.float32)
                        token, channel = place // D + i * BLOCK, place % D
                        upper = (channel >= D // 2)[None, :]
                        pair = tl.broadcast_to((channel % (D // 2))[None, :], (M, EC))
                        a, b = tl.gather(q1, pair, 1), tl.gather(q2, pair, 1)
                        if ROPE:
                            angle = token.to(tl.float32) * tl.gather(turns, channel % (D // 2), 0)
                            c, s = cos_sin(angle[None, :])
                            a, b = a * c + b * s, b * c - a * s
                        part = tl.where(upper, b, a) * value[None, :]
                        hot = (token[:, None] == tile[None, :]).to(tl.float32)
                        logits = tl.dot(part, hot, logits, input_precision=PRECISION)
                        e += EC
            if ROPE:
                logits *= rope_scale
                q1, q2 = q1 * cos_n + q2 * sin_n, q2 * cos_n - q1 * sin_n
            i_column = at + SINKS + tile
            logits, m_seen = shape_logits(logits, i_column, q_column, slope, cap, window, HAS_CAP)
            # A padded row's own sinks are read with the windows.
            m_seen = m_seen & (m_token & (i_column >= first + SINKS))[None, :]
            m, total, acc1, acc2, zeros, p = softmax_step(
                m, total, acc1, acc2, zeros, logits, m_seen
            )
            code1, code2 = codes(
                p_base + V_CODES, i_h * PAGE + o_token, m_token, DV, HALF_V, T, V_BITS
            )
            v1 = level(code1, p_v_lut, V_BITS, V_UNIFORM)
            v2 = level(code2, p_v_lut, V_BITS, V_UNIFORM)
            weight = p
            if V_KIND == "token":
                p_r = (p_base + V_SCALE).to(tl.pointer_type(STORE)) + o_token
                weight *= tl.load(p_r, mask=m_token, other=0.0).to(tl.float32)[None, :]
                p_r = (p_base + V_ZERO).to(tl.pointer_type(STORE)) + o_token
                centre = tl.load(p_r, mask=m_token, other=0.0).to(tl.float32)
                zeros += tl.sum(p * centre[None, :], 1)
            else:
                if V_KIND != "calibrated":
                    p_r = (p_base + V_SCALE).to(tl.pointer_type(STORE))
                    vs1, vs2 = range_of(
                        p_r, i_h, o_token, m_token, PAGE, DV, HALF_V, T, V_KIND, V_GROUP
                    )
                    p_r = (p_base + V_ZERO).to(tl.pointer_type(STORE))
                    vz1, vz2 = range_of(
                        p_r, i_h, o_token, m_token, PAGE, DV, HALF_V, T, V_KIND, V_GROUP
                    )
                v1, v2 = v1 * vs1 + vz1, v2 * vs2 + vz2
            acc1 = tl.dot(
                operand(weight, dtype, WIDE), operand(v1, dtype, WIDE), acc1, input_precision="ieee"
            )
            acc2 = tl.dot(
                operand(weight, dtype, WIDE), operand(v2, dtype, WIDE), acc2, input_precision="ieee"
            )
            if V_RANK:
                acc1, acc2 = add_values(
                    acc1, acc2, p, p_base, i_h, at % PAGE, tile, V_RANK, V_FACTOR_BITS,
                    V_LEFT, V_RIGHT, V_FACTOR_SCALE, BLOCK, PAGE, T, DV, HALF_V, STORE,
                )  # fmt: skip
            if V_SLOTS:
                for i in tl.static_range(T // BLOCK):
                    p_i, p_x, e, e_end = _corrections(
                        p_base,
                        i_h,
                        at % PAGE // BLOCK + i,
                        V_INDEX,
                        V_VALUE,
                        V_START,
                        BLOCK * V_SLOTS,
                        H,
                        BLOCK * DV > 256,
                        BLOCK * V_SLOTS > 255,
                        STORE,
                    )
                    while e < e_end:
                        o_e = e + tl.arange(0, EC)
                        place = tl.load(p_i + o_e, mask=o_e < e_end, other=0).to(tl.int32)
                        value = tl.load(p_x + o_e, mask=o_e < e_end, other=0.0).to(tl.float32)
                        token, channel = place // DV + i * BLOCK, place % DV
                        hot = (tile[:, None] == token[None, :]).to(tl.float32)
                        share_e = tl.dot(p, hot, input_precision=PRECISION) * value[None, :]
                        hot = (channel[:, None] == low_v[None, :]).to(tl.float32)
                        acc1 = tl.dot(share_e, hot, acc1, input_precision=PRECISION)
                        hot = channel[:, None] == (low_v + DV // 2)[None, :]
                        hot = (hot & m_low_v[None, :]).to(tl.float32)
                        acc2 = tl.dot(share_e, hot, acc2, input_precision=PRECISION)
                        e += EC
        if V_KIND == "token":
            acc1 += zeros[:, None]
            acc2 += zeros[:, None]
    else:
        i_new, n_new = tl.load(p_counts + 3), tl.load(p_counts + 4)
        for at in range(0, SINKS, T):
            slot = at + tile
            m, total, acc1, acc2 = dense_tiles(
                q1,
                q2,
                m,
                total,
                acc1,
                acc2,
                p_sink_k + (i_b * H + i_h) * SINKS * D,
                p_sink_v + (i_b * H + i_h) * SINKS * DV,
                p_sink_at + i_b * own_positions * SINKS,
                p_turns,
                slot,
                slot < SINKS,
                first + slot,
                q_column,
                slope,
                rope_scale,
                cap,
                window,
                T,
                D,
                HALF,
                DV,
                HALF_V,
                ROPE,
                HAS_CAP,
                WIDE,
            )
        for at in range(0, n_new, T):
            slot = at + tile
            m, total, acc1, acc2 = dense_tiles(
                q1,
                q2,
                m,
                total,
                acc1,
                acc2,
                p_new_k + (i_b * H + i_h) * ROOM * D,
                p_new_v + (i_b * H + i_h) * ROOM * DV,
                p_new_at + i_b * own_positions * ROOM,
                p_turns,
                slot,
                (slot < n_new) & (i_new + slot >= first + SINKS),
                i_new + slot,
                q_column,
                slope,
                rope_scale,
                cap,
                window,
                T,
                D,
                HALF,
                DV,
                HALF_V,
                ROPE,
                HAS_CAP,
                WIDE,
            )
    whole = tl.where(total == 0.0, 1.0, total)
    o_part = ((i_b * H + i_h) * (splits + 1) + i_s) * R + row
    p_o = p_out + o_part[:, None] * DV + low_v[None, :]
    m_o = m_row[:, None] & m_low_v[None, :]
    tl.store(p_o, acc1 / whole[:, None], mask=m_o)
    tl.store(p_o + DV // 2, acc2 / whole[:, None], mask=m_o)
    tl.store(p_lse + o_part, tl.where(total == 0.0, m, m + tl.log2(whole)), mask=m_row)


def variants() -> list[Variant]:
    """What is compiled ahead of time; see `aot`."""
    from kvsmith.kernels.attend_encoded.variants import attend_variants

    return attend_variants()
