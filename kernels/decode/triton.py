"""Device functions that decode a tile of one head.

Keys come as two halves of channels [T, HALF], tokens by row: RoPE turns channels j and j + D/2
together, and bytes of 4 and 2 bit planes hold both. Values come as [2 HALF, T], channels by row.

Which channel stands at which place of a tile is free, as long as all that meets the tile agrees. At
2 to 4 bits it is chosen so that words of 32 bits are loaded by the threads that feed what becomes
of them to the tensor cores: a thread owns the tokens and channels of its operand from load to
product, and nothing goes through shared memory. Other widths are read a byte at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvsmith.kernels.aot import Variant

# A lane of 32 holds the level of its own number, of its lowest bits where there are fewer.
LANE_LEVEL = tl.constexpr(
    "{ .reg .b64 a; .reg .b32 t; mov.u32 t, %laneid; and.b32 t, t, $2; "
    "mad.wide.u32 a, t, 4, $1; ld.global.nc.f32 $0, [a]; }"
)
# Only the 5 lowest bits of a number count for a shuffle.
SHUFFLE = tl.constexpr("shfl.sync.idx.b32 $0, $2, $1, 31, -1;")


@triton.constexpr_function
def in_words(D: int, HALF: int, BITS: int, LANES: int) -> bool:
    """Whether a row of codes is read in words, so many of them at least."""
    return D == 2 * HALF and BITS in (2, 3, 4) and D * first_plane(BITS) >= 32 * LANES


@triton.constexpr_function
def first_plane(BITS: int) -> int:
    """Bits of the first plane: 8, or a power of two."""
    return 8 if BITS == 8 else 1 << BITS.bit_length() - 1


@triton.constexpr_function
def row_bytes(D: int, BITS: int) -> int:
    """Bytes of the codes of a token: planes of 4, 2 and 1 bits, or one of 8."""
    widths = [8] if BITS == 8 else [w for w in (4, 2, 1) if BITS & w]
    return sum(-(-D * w // 8) for w in widths)


@triton.jit
def key_channels(D: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr):
    """[HALF] int32, the channel of the lower half at each place.

    Places count (byte, word / 4, word % 4, last), `last` the lowest bit of the byte at 4 bits and
    of the slot in it at 2.
    """
    place = tl.arange(0, HALF)
    if in_words(D, HALF, BITS, 4):
        WORDS: tl.constexpr = D * first_plane(BITS) // 32
        last, word, more = place % 2, place // 2 % WORDS, place // (2 * WORDS)
        if BITS == 4:
            place = 4 * word + 2 * more + last
        else:
            place = 4 * word + more + last * (D // 4)
    return place


@triton.jit
def key_places(channel, D: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr):
    """Places of channels of the lower half, as `key_channels` orders them."""
    if in_words(D, HALF, BITS, 4):
        WORDS: tl.constexpr = D * first_plane(BITS) // 32
        if BITS == 4:
            return channel // 2 % 2 * (2 * WORDS) + channel // 4 * 2 + channel % 2
        else:
            last, channel = channel // (D // 4), channel % (D // 4)
            return channel % 4 * (2 * WORDS) + channel // 4 * 2 + last
    return channel


@triton.jit
def value_channels(row, D: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr):
    """Channels of rows of a tile, which count (slot, byte, word); rows of none have one of D or
    more.
    """
    if in_words(D, HALF, BITS, 8):
        WORDS: tl.constexpr = D * first_plane(BITS) // 32
        return 4 * (row % WORDS) + row // WORDS % 4 + row // (4 * WORDS) * (4 * WORDS)
    low = row % HALF
    return tl.where(low < D // 2, low + row // HALF * (D // 2), D)


@triton.jit
def key_spread(x, T: tl.constexpr, HALF: tl.constexpr, WORDS: tl.constexpr):
    """Words [T, WORDS / 4, 4] at all places that they reach [T, HALF]."""
    x = tl.broadcast_to(tl.reshape(x, (T, 1, WORDS, 1)), (T, HALF // (2 * WORDS), WORDS, 2))
    return tl.reshape(x, (T, HALF))


@triton.jit
def value_spread(x, T: tl.constexpr, HALF: tl.constexpr, WORDS: tl.constexpr):
    """Words [T / 8, 2, WORDS / 8, 8, 4] at all rows that they reach [2 HALF, T]."""
    x = tl.reshape(tl.permute(x, (2, 3, 0, 4, 1)), (1, WORDS, T))
    return tl.reshape(tl.broadcast_to(x, (2 * HALF // WORDS, WORDS, T)), (2 * HALF, T))


@triton.jit
def key_codes(
    p_codes, o_token, m_token, T: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Lower and upper codes of tokens `o_token` [T], int32 [T, HALF]; bits above them are
    anything.
    """
    low = tl.arange(0, HALF)
    if in_words(D, HALF, BITS, 4):
        WIDTH: tl.constexpr = first_plane(BITS)
        WORDS: tl.constexpr = D * WIDTH // 32
        # What is said of neighbours orders threads: 4 across words, then 8 across tokens. It makes
        # no wider loads, since nothing is said of alignment.
        word = tl.arange(0, WORDS // 4)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
        p_words = p_codes.to(tl.pointer_type(tl.int32))
        o = o_token[:, None, None] * (row_bytes(D, BITS) // 4)
        seen = m_token[:, None, None]
        words = tl.load(p_words + tl.max_contiguous(o + word, [2, 1, 4]), mask=seen, other=0)
        words = key_spread(words, T, HALF, WORDS)
        shift = low // (2 * WORDS) * (4 * WIDTH) + low % 2 * (8 if BITS == 4 else 2)
        words >>= shift[None, :]
        upper = words >> 4
        if BITS == 3:
            o += WORDS + word % (WORDS // 2)
            more = tl.load(p_words + tl.max_contiguous(o, [2, 1, 4]), mask=seen, other=0)
            shift += low // 2 % WORDS // (WORDS // 2)
            more = key_spread(more, T, HALF, WORDS) >> shift[None, :]
            words, upper = words & 3 | more << 2 & 4, upper & 3 | more >> 2 & 4
        return words, upper
    seen = m_token[:, None] & (low < D // 2)[None, :]
    p_row = p_codes + o_token[:, None] * row_bytes(D, BITS)
    lower = byte_codes(p_row, low[None, :], seen, D, BITS)
    return lower, byte_codes(p_row, (low + D // 2)[None, :], seen, D, BITS)


@triton.jit
def value_codes(
    p_codes, at, count, T: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """Codes of the first `count` of T tokens from row `at` on, int32 [2 HALF, T]; bits above them
    are anything.
    """
    row = tl.arange(0, 2 * HALF)
    if in_words(D, HALF, BITS, 8):
        WIDTH: tl.constexpr = first_plane(BITS)
        WORDS: tl.constexpr = D * WIDTH // 32
        # 4 threads across tokens, then 8 across words, see above.
        group, last = tl.arange(0, T // 8)[:, None, None, None, None], tl.arange(0, 2)
        lane = tl.arange(0, 4)[None, None, None, None, :]
        token = group * 8 + lane * 2 + last[None, :, None, None, None]
        word = tl.arange(0, WORDS // 8)[None, None, :, None, None] * 8
        word += tl.arange(0, 8)[None, None, None, :, None]
        p_words = p_codes.to(tl.pointer_type(tl.int32))
        o = (at + token) * (row_bytes(D, BITS) // 4)
        seen = token < count
        words = tl.max_contiguous(o + word, [1, 1, 1, 2, 4])
        words = value_spread(tl.load(p_words + words, mask=seen, other=0), T, HALF, WORDS)
        shift = row // WORDS % 4 * 8 + row // (4 * WORDS) * WIDTH
        words >>= shift[:, None]
        if BITS == 3:
            o = tl.max_contiguous(o + WORDS + word % (WORDS // 2), [1, 1, 1, 2, 4])
            more = value_spread(tl.load(p_words + o, mask=seen, other=0), T, HALF, WORDS)
            shift += row % WORDS // (WORDS // 2)
            words = words & 3 | more >> shift[:, None] << 2 & 4
        return words
    channel, o_tile = value_channels(row, D, HALF, BITS)[:, None], tl.arange(0, T)[None, :]
    p_row = p_codes + (at + o_tile) * row_bytes(D, BITS)
    return byte_codes(p_row, channel, (o_tile < count) & (channel < D), D, BITS)


@triton.jit
def byte_codes(p_row, channel, seen, D: tl.constexpr, BITS: tl.constexpr):
    """Codes of channels of rows, int32."""
    FIRST: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else (2 if BITS >= 2 else 1))
    REST: tl.constexpr = BITS - FIRST
    SECOND: tl.constexpr = 2 if REST >= 2 else 1
    STRIDE: tl.constexpr = (D * FIRST + 7) // 8
    EXTRA: tl.constexpr = (D * SECOND + 7) // 8
    code = plane(p_row, channel, seen, D, FIRST)
    if REST:
        code |= plane(p_row + STRIDE, channel, seen, D, SECOND) << FIRST
    if REST == 3:
        code |= plane(p_row + STRIDE + EXTRA, channel, seen, D, 1) << 6
    return code


@triton.jit
def plane(p_row, channel, seen, D: tl.constexpr, WIDTH: tl.constexpr):
    """Codes of one plane; `p_row` points at its first byte."""
    SIZE: tl.constexpr = (D * WIDTH + 7) // 8
    byte = tl.load(p_row + channel % SIZE, mask=seen, other=0).to(tl.int32)
    return (byte >> (channel // SIZE * WIDTH)) & ((1 << WIDTH) - 1)


@triton.jit
def codebook(p_lut, BITS: tl.constexpr, UNIFORM: tl.constexpr, SHUFFLES: tl.constexpr):
    """What `level` looks up in: its own level for each lane, or all of them."""
    if UNIFORM or BITS > 4:
        return p_lut
    elif SHUFFLES:
        args = [p_lut, (1 << BITS) - 1]
        return tl.inline_asm_elementwise(
            LANE_LEVEL, "=f,l,r", args, dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        # Sixteen, as the gather's threads of a row are at least.
        return tl.load(p_lut + tl.arange(0, 16) % (1 << BITS))


@triton.jit
def level(
    code, table, BITS: tl.constexpr, UNIFORM: tl.constexpr, SHUFFLES: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """Normalised value of each code [rows, columns], dtype F; bits above the codes are ignored."""
    C: tl.constexpr = 1 << BITS
    if UNIFORM:
        code &= C - 1
        if F == tl.float16:
            # 1024 + code, exactly, without a conversion.
            number = (code | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1024.0
        else:
            number = code.to(F)
        return (number * (2.0 / (C - 1)) - 1.0).to(F)
    elif BITS > 4:
        return tl.load(table + (code & (C - 1))).to(F)
    elif SHUFFLES:
        found = tl.inline_asm_elementwise(
            SHUFFLE, "=f,r,f", [code, table], dtype=tl.float32, is_pure=True, pack=1
        )
        return found.to(F)
    else:
        every = tl.broadcast_to(table[None, :], (code.shape[0], 16))
        return tl.gather(every, code & (C - 1), 1).to(F)


@triton.jit
def key_range(
    p_values, i_head, o_token, m_token, T: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Stored scale or zero of tokens `o_token` of a page, to broadcast to lower and upper
    [T, HALF].

    KIND "token": [PAGE]; "group": [H, PAGE, D / GROUP]; "channel": [H, PAGE / GROUP, D], where all
    tokens of the tile lie in one group.
    """
    channel = key_channels(D, HALF, BITS)
    if KIND == "token" or (KIND == "group" and GROUP == D):
        first = o_token if KIND == "token" else i_head * PAGE + o_token
        lower = tl.load(p_values + first, mask=m_token, other=0.0)[:, None]
        return lower, lower
    elif KIND == "group":
        p_row = p_values + (i_head * PAGE + o_token) * (D // GROUP)
        if D == 2 * HALF and (GROUP % 4 == 0 or not in_words(D, HALF, BITS, 4)):
            # Places (byte, word, last), or channels as they are.
            SLOTS: tl.constexpr = 4 // first_plane(BITS) if in_words(D, HALF, BITS, 4) else 1
            SIDE: tl.constexpr = HALF // SLOTS
            N: tl.constexpr = SIDE // GROUP if GROUP < SIDE else 1
            group, slot = tl.arange(0, N)[None, None, :, None, None], tl.arange(0, SLOTS)
            slot = slot[None, None, None, None, :]
            p_group = p_row[:, None, None, None, None] + (group + slot * SIDE // GROUP)
            seen = m_token[:, None, None, None, None]
            lower = tl.load(p_group, mask=seen, other=0.0)
            upper = tl.load(p_group + HALF // GROUP, mask=seen, other=0.0)
            lower = spread(lower, T, HALF, BITS, D, N)
            upper = spread(upper, T, HALF, BITS, D, N)
        else:
            seen = m_token[:, None] & (channel < D // 2)[None, :]
            p_group = p_row[:, None] + channel[None, :] // GROUP
            lower = tl.load(p_group, mask=seen, other=0.0)
            p_group = p_row[:, None] + (channel + D // 2)[None, :] // GROUP
            upper = tl.load(p_group, mask=seen, other=0.0)
        return lower, upper
    else:
        p_row = p_values + (i_head * (PAGE // GROUP) + tl.min(o_token, 0) // GROUP) * D + channel
        inside = channel < D // 2
        lower = tl.load(p_row, mask=inside, other=0.0)
        upper = tl.load(p_row + D // 2, mask=inside, other=0.0)
        return lower[None, :], upper[None, :]


@triton.jit
def spread(
    x, T: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Ranges [T, 1, N, 1, slots] of groups at all their places [T, HALF]."""
    if in_words(D, HALF, BITS, 4):
        WORDS: tl.constexpr = HALF * first_plane(BITS) // 16
        x = tl.broadcast_to(x, (T, HALF // (2 * WORDS), N, WORDS // N, 2))
    else:
        x = tl.broadcast_to(x, (T, 1, N, HALF // N, 1))
    return tl.reshape(x, (T, HALF))


@triton.jit
def value_range(
    p_values, i_head, at, count, T: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The same of the first `count` of T tokens from `at` on, to broadcast to [2 HALF, T]."""
    channel = value_channels(tl.arange(0, 2 * HALF), D, HALF, BITS)
    o_tile = tl.arange(0, T)
    if KIND == "token" or (KIND == "group" and GROUP == D):
        token = at + o_tile if KIND == "token" else i_head * PAGE + at + o_tile
        return tl.load(p_values + token, mask=o_tile < count, other=0.0)[None, :]
    elif KIND == "channel":
        p_row = p_values + (i_head * (PAGE // GROUP) + at // GROUP) * D + channel
        return tl.load(p_row, mask=channel < D, other=0.0)[:, None]
    else:
        p_row = p_values + (i_head * PAGE + at + o_tile) * (D // GROUP)
        if D == 2 * HALF and (GROUP % 4 == 0 or not in_words(D, HALF, BITS, 8)):
            # Rows (slot, byte, word), or channels as they are.
            SLOTS: tl.constexpr = 8 // first_plane(BITS) if in_words(D, HALF, BITS, 8) else 1
            BYTES: tl.constexpr = 4 if in_words(D, HALF, BITS, 8) else 1
            SIDE: tl.constexpr = D // SLOTS
            N: tl.constexpr = SIDE // GROUP if GROUP < SIDE else 1
            slot, group = tl.arange(0, SLOTS)[:, None, None, None, None], tl.arange(0, N)
            group = group[None, None, :, None, None] + slot * SIDE // GROUP
            seen = (o_tile < count)[None, None, None, None, :]
            x = tl.load(p_row[None, None, None, None, :] + group, mask=seen, other=0.0)
            x = tl.broadcast_to(x, (SLOTS, BYTES, N, D // (SLOTS * BYTES * N), T))
            return tl.reshape(x, (D, T))
        else:
            seen = (o_tile < count)[None, :] & (channel < D)[:, None]
            p_group = p_row[None, :] + channel[:, None] // GROUP
            return tl.load(p_group, mask=seen, other=0.0)


@triton.jit
def lookup_kernel(p_lut, p_out, BITS: tl.constexpr, SHUFFLES: tl.constexpr):
    """Levels [32, 16] of the numbers 0, 1, ... as codes, whose higher bits are to be ignored."""
    place = tl.arange(0, 32)[:, None] * 16 + tl.arange(0, 16)[None, :]
    table = codebook(p_lut, BITS, False, SHUFFLES)
    tl.store(p_out + place, level(place, table, BITS, False, SHUFFLES, tl.float32))


def variants() -> list[Variant]:
    """What is compiled ahead of time; see `aot`."""
    signature = {"p_lut": "*fp32:16", "p_out": "*fp32:16"}
    return [
        Variant(
            "decode",
            f"levels of {bits} bits",
            lookup_kernel,
            signature,
            {"BITS": bits, "SHUFFLES": backend == "cuda"},
            num_warps=1,
            backend=backend,
        )
        for backend in ("cuda", "hip")
        for bits in (4, 2)
    ]
