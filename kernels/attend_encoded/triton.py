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
from kvsmith.kernels.attend.triton import cos_sin, dense_tiles, shape_logits, softmax_step, turn
from kvsmith.kernels.decode.triton import (
    codebook,
    key_channels,
    key_codes,
    key_places,
    key_range,
    level,
    value_channels,
    value_codes,
    value_range,
)
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
    page_row,
    own_positions,
    splits,
    H: tl.constexpr, R: tl.constexpr, T_NEW: tl.constexpr, M: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, DV: tl.constexpr, HALF_V: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, EC: tl.constexpr,
    SINKS: tl.constexpr, ROOM: tl.constexpr, PRECISION: tl.constexpr,
    ROPE: tl.constexpr, HAS_CAP: tl.constexpr, WIDE: tl.constexpr, STORE: tl.constexpr,
    F: tl.constexpr, SHUFFLES: tl.constexpr,
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
    # Small numbers in 32 bits: registers are what there is least of.
    i_b, i_h, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row, tile = tl.arange(0, M), tl.arange(0, T)
    k_channel = key_channels(D, HALF, K_BITS)
    v_channel = value_channels(tl.arange(0, 2 * HALF_V), DV, HALF_V, V_BITS)
    m_row, m_k, m_v = row < R, k_channel < D // 2, v_channel < DV
    # Threads are to lie across channels, so that what turns a channel is held once; nothing is to
    # be loaded in pairs, which channels are not.
    o_q = tl.multiple_of(tl.max_contiguous(row[None, :] * D + k_channel[:, None], [2, 1]), [1, 1])
    p_row = p_q + (i_b * H + i_h) * R * D + o_q
    m_q = m_row[None, :] & m_k[:, None]
    q1 = tl.load(p_row, mask=m_q, other=0.0).to(tl.float32) * scale
    q2 = tl.load(p_row + D // 2, mask=m_q, other=0.0).to(tl.float32) * scale
    slope = tl.load(p_slope + i_h * (R // T_NEW) + row // T_NEW, mask=m_row, other=0.0)
    # Body tokens [from, stop) of this cache; body token 0 lies at column SINKS.
    stop, begin = tl.load(p_counts).to(tl.int32), tl.load(p_counts + 1).to(tl.int32)
    q_column = tl.load(p_counts + 2).to(tl.int32) + row % T_NEW
    first, shift = tl.load(p_first + i_b).to(tl.int32), tl.load(p_shift + i_b)
    m = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((2 * HALF_V, M), tl.float32)
    if i_s < splits:
        tiles = tl.cdiv(stop - begin, T)
        share = tl.cdiv(tiles, splits)
        start = begin + i_s * share * T
        end = tl.minimum(stop, start + share * T)
        k_table = codebook(p_k_lut, K_BITS, K_UNIFORM, SHUFFLES)
        v_table = codebook(p_v_lut, V_BITS, V_UNIFORM, SHUFFLES)
        if ROPE:
            exact = tl.load(p_turns + k_channel, mask=m_k, other=0.0)  # revolutions a position
            turns = exact.to(tl.float32)
            cos_t, sin_t = cos_sin(tile[:, None] * turns[None, :])
            cos_t, sin_t = cos_t.to(F), sin_t.to(F)
            cos_0, sin_0 = turn(start + SINKS + shift, exact)
            cos_0, sin_0 = cos_0[:, None], sin_0[:, None]
            q1, q2 = q1 * cos_0 + q2 * sin_0, q2 * cos_0 - q1 * sin_0
            cos_n, sin_n = cos_sin(T * turns)
            cos_n, sin_n = cos_n[:, None], sin_n[:, None]
        if K_KIND == "calibrated":
            p_c = i_h * D + k_channel
            ks1 = tl.load(p_k_scale + p_c, mask=m_k, other=0.0)[None, :].to(F)
            ks2 = tl.load(p_k_scale + p_c + D // 2, mask=m_k, other=0.0)[None, :].to(F)
            kz1 = tl.load(p_k_zero + p_c, mask=m_k, other=0.0)[None, :].to(F)
            kz2 = tl.load(p_k_zero + p_c + D // 2, mask=m_k, other=0.0)[None, :].to(F)
        if V_KIND == "calibrated":
            p_c = i_h * DV + v_channel
            vs = tl.load(p_v_scale + p_c, mask=m_v, other=0.0)[:, None].to(F)
            vz = tl.load(p_v_zero + p_c, mask=m_v, other=0.0)[:, None].to(F)
        # What a tile needs and others share is made again, not held in registers.
        for at in tl.range(start, end, T, disable_licm=True):
            page = tl.load(p_pages + at // PAGE - begin // PAGE)
            p_base = page.to(tl.pointer_type(tl.uint8)) + i_b * page_row
            in_page = at % PAGE
            o_token = in_page + tile
            m_token = at + tile < end
            code1, code2 = key_codes(
                p_base + K_CODES, i_h * PAGE + o_token, m_token, T, D, HALF, K_BITS
            )
            k1 = level(code1, k_table, K_BITS, K_UNIFORM, SHUFFLES, F)
            k2 = level(code2, k_table, K_BITS, K_UNIFORM, SHUFFLES, F)
            if K_KIND != "calibrated":
                p_r = (p_base + K_SCALE).to(tl.pointer_type(STORE))
                ks1, ks2 = key_range(
                    p_r, i_h, o_token, m_token, T, PAGE, D, HALF, K_BITS, K_KIND, K_GROUP
                )
                p_r = (p_base + K_ZERO).to(tl.pointer_type(STORE))
                kz1, kz2 = key_range(
                    p_r, i_h, o_token, m_token, T, PAGE, D, HALF, K_BITS, K_KIND, K_GROUP
                )
            k1, k2 = k1 * ks1.to(F) + kz1.to(F), k2 * ks2.to(F) + kz2.to(F)
            if ROPE:
                k1, k2 = k1 * cos_t - k2 * sin_t, k2 * cos_t + k1 * sin_t
            logits = tl.dot(k1, q1.to(F), input_precision="ieee")
            logits = tl.dot(k2, q2.to(F), logits, input_precision="ieee")
            if K_RANK:
                logits = add_logits(
                    logits, q1, q2, k_channel, p_base, i_h, in_page, tile, K_RANK, K_FACTOR_BITS,
                    K_LEFT, K_RIGHT, K_FACTOR_SCALE, BLOCK, PAGE, T, D, STORE,
                )  # fmt: skip
            if K_SLOTS:
                for i in tl.static_range(T // BLOCK):
                    p_i, p_x, e, e_end = _corrections(
                        p_base, i_h, in_page // BLOCK + i, K_INDEX, K_VALUE, K_START,
                        BLOCK * K_SLOTS, H, BLOCK * D > 256, BLOCK * K_SLOTS > 255, STORE,
                    )  # fmt: skip
                    while e < e_end:
                        o_e = e + tl.arange(0, EC)
                        index = tl.load(p_i + o_e, mask=o_e < e_end, other=0).to(tl.int32)
                        value = tl.load(p_x + o_e, mask=o_e < e_end, other=0.0).to(tl.float32)
                        token, channel = index // D + i * BLOCK, index % D
                        half = channel % (D // 2)
                        place = key_places(half, D, HALF, K_BITS)
                        pair = tl.broadcast_to(place[:, None], (EC, M))
                        a, b = tl.gather(q1, pair, 0), tl.gather(q2, pair, 0)
                        if ROPE:
                            c, s = cos_sin(token.to(tl.float32) * tl.gather(turns, place, 0))
                            c, s = c[:, None], s[:, None]
                            a, b = a * c + b * s, b * c - a * s
                        part = tl.where((channel >= D // 2)[:, None], b, a) * value[:, None]
                        hot = (tile[:, None] == token[None, :]).to(F)
                        logits = tl.dot(hot, part.to(F), logits, input_precision=PRECISION)
                        e += EC
            if ROPE:
                logits *= rope_scale
                q1, q2 = q1 * cos_n + q2 * sin_n, q2 * cos_n - q1 * sin_n
            i_column = at + SINKS + tile
            logits, m_seen = shape_logits(logits, i_column, q_column, slope, cap, window, HAS_CAP)
            # A padded row's own sinks are read with the windows.
            m_seen = m_seen & (m_token & (i_column >= first + SINKS))[:, None]
            m, total, fade, p = softmax_step(m, total, logits, m_seen)
            acc *= fade[None, :]
            codes = value_codes(
                p_base + V_CODES, i_h * PAGE + in_page, end - at, T, DV, HALF_V, V_BITS
            )
            v = level(codes, v_table, V_BITS, V_UNIFORM, SHUFFLES, F)
            if V_KIND != "calibrated":
                p_r = (p_base + V_SCALE).to(tl.pointer_type(STORE))
                vs = value_range(
                    p_r, i_h, in_page, end - at, T, PAGE, DV, HALF_V, V_BITS, V_KIND, V_GROUP
                )
                p_r = (p_base + V_ZERO).to(tl.pointer_type(STORE))
                vz = value_range(
                    p_r, i_h, in_page, end - at, T, PAGE, DV, HALF_V, V_BITS, V_KIND, V_GROUP
                )
            v = v * vs.to(F) + vz.to(F)
            acc = tl.dot(v, p.to(F), acc, input_precision="ieee")
            if V_RANK:
                acc = add_values(
                    acc, p, v_channel, p_base, i_h, in_page, tile, V_RANK, V_FACTOR_BITS,
                    V_LEFT, V_RIGHT, V_FACTOR_SCALE, BLOCK, PAGE, T, DV, STORE,
                )  # fmt: skip
            if V_SLOTS:
                for i in tl.static_range(T // BLOCK):
                    p_i, p_x, e, e_end = _corrections(
                        p_base, i_h, in_page // BLOCK + i, V_INDEX, V_VALUE, V_START,
                        BLOCK * V_SLOTS, H, BLOCK * DV > 256, BLOCK * V_SLOTS > 255, STORE,
                    )  # fmt: skip
                    while e < e_end:
                        o_e = e + tl.arange(0, EC)
                        index = tl.load(p_i + o_e, mask=o_e < e_end, other=0).to(tl.int32)
                        value = tl.load(p_x + o_e, mask=o_e < e_end, other=0.0).to(tl.float32)
                        token, channel = index // DV + i * BLOCK, index % DV
                        hot = (token[:, None] == tile[None, :]).to(F)
                        part = tl.dot(hot, p.to(F), input_precision=PRECISION) * value[:, None]
                        hot = (v_channel[:, None] == channel[None, :]).to(F)
                        acc = tl.dot(hot, part.to(F), acc, input_precision=PRECISION)
                        e += EC
    else:
        i_new, n_new = tl.load(p_counts + 3).to(tl.int32), tl.load(p_counts + 4).to(tl.int32)
        for at in range(0, SINKS, T):
            slot = at + tile
            m, total, acc = dense_tiles(
                q1, q2, m, total, acc,
                p_sink_k + (i_b * H + i_h) * SINKS * D, p_sink_v + (i_b * H + i_h) * SINKS * DV,
                p_sink_at + i_b * own_positions * SINKS, p_turns, k_channel, v_channel,
                slot, slot < SINKS, first + slot,
                q_column, slope, rope_scale, cap, window, D, DV, ROPE, HAS_CAP, WIDE,
            )  # fmt: skip
        for at in range(0, n_new, T):
            slot = at + tile
            m, total, acc = dense_tiles(
                q1, q2, m, total, acc,
                p_new_k + (i_b * H + i_h) * ROOM * D, p_new_v + (i_b * H + i_h) * ROOM * DV,
                p_new_at + i_b * own_positions * ROOM, p_turns, k_channel, v_channel,
                slot, (slot < n_new) & (i_new + slot >= first + SINKS), i_new + slot,
                q_column, slope, rope_scale, cap, window, D, DV, ROPE, HAS_CAP, WIDE,
            )  # fmt: skip
    whole = tl.where(total == 0.0, 1.0, total)
    o_part = ((i_b * H + i_h) * (splits + 1) + i_s) * R + row
    p_o = p_out + o_part[None, :] * DV + v_channel[:, None]
    tl.store(p_o, acc / whole[None, :], mask=m_row[None, :] & m_v[:, None])
    tl.store(p_lse + o_part, tl.where(total == 0.0, m, m + tl.log2(whole)), mask=m_row)


def variants() -> list[Variant]:
    """What is compiled ahead of time; see `aot`."""
    from kvsmith.kernels.attend_encoded.variants import attend_variants

    return attend_variants()
