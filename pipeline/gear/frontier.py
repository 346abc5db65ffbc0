"""Squared error against bits: what a byte of outliers, of factors or of codes is worth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean

import torch
from torch import Tensor

from kvsmith.codec import Codec
from kvsmith.kernels.format import Factors
from kvsmith.kernels.low_rank.api import add_low_rank, fit_low_rank, read_factors
from kvsmith.pipeline.gear.error import Found, Pair, captured, measure, relative
from kvsmith.pipeline.log import Run
from kvsmith.spec import LowRank, TensorCodec, TopK, Uniform

LOW_RANKS = [LowRank(rank, bits=width) for rank in (1, 2, 4, 8) for width in (None, 8, 4)]
PARTS: dict[str, tuple[int, float, LowRank | None]] = {
    # more bits, outliers, low rank
    "one more bit": (1, 0.0, None),
    "S 2 %": (0, 0.02, None),
    "R 2 x 16": (0, 0.0, LowRank(2)),
    "R 4 x 16": (0, 0.0, LowRank(4)),
    "R 4 x 8": (0, 0.0, LowRank(4, bits=8)),
    "R 4 x 4": (0, 0.0, LowRank(4, bits=4)),
    "R 8 x 4": (0, 0.0, LowRank(8, bits=4)),
}


def quantizers(bits: int) -> tuple[Uniform, Uniform]:
    """KIVI's for keys and for values."""
    return Uniform(bits, "channel", 64), Uniform(bits, "token", 64)


def frontier(log: Run) -> None:
    """Outliers, ranks, widths of factors, lengths of blocks, factors that heads share."""
    layers = [(k[:2], v[:2]) for k, v in captured()[::2]]
    for bits in (2, 3, 4):
        found = {f"{bits + 1} bits, nothing else": _mean(layers, bits + 1, 64, 0.0, (None, None))}
        for name, block, fraction, lows in _choices():
            found[name] = _mean(layers, bits, block, fraction, lows)
        found |= _shared(layers, bits)
        least, rows = math.inf, []
        for name, (size, left) in sorted(found.items(), key=lambda item: item[1]):
            rows.append(["*" if left < least else "", f"{size:.3f}", f"{left:.5f}", name])
            least = min(least, left)
        title = f"{bits} bits and what corrects them; * is the frontier"
        log.table(title, ("", "bits", "squared error", "what"), rows)


def _choices() -> Iterator[tuple[str, int, float, tuple[LowRank | None, LowRank | None]]]:
    for block in (64, 256):
        for fraction in (0.0, 0.02, 0.04):
            for low in (None, *LOW_RANKS):
                rank = "no rank" if low is None else f"R {low.rank} x {low.bits or 16} bits"
                yield f"block {block}, S {100 * fraction:g} %, {rank}", block, fraction, (low, low)
    for k, v in ((4, 2), (2, 4), (4, 1)):
        name = f"block 64, S 2 %, R {k} of keys, {v} of values x 4 bits"
        yield name, 64, 0.02, (LowRank(k, bits=4), LowRank(v, bits=4))


def _mean(
    layers: Sequence[Pair],
    bits: int,
    block: int,
    fraction: float,
    lows: tuple[LowRank | None, LowRank | None],
) -> Found:
    outliers = TopK(fraction) if fraction else None
    found = [
        measure(x, TensorCodec(q, outliers, low), block)
        for pair in layers
        for x, q, low in zip(pair, quantizers(bits), lows, strict=True)
    ]
    return fmean(f[0] for f in found), fmean(f[1] for f in found)


def _shared(layers: Sequence[Pair], bits: int, block: int = 64) -> dict[str, Found]:
    """Two columns that heads share: one A for the tokens of a block, or one B for all heads."""
    found: dict[str, list[Found]] = {}
    for pair in layers:
        for x, q in zip(pair, quantizers(bits), strict=True):
            codec = Codec(TensorCodec(q), x.shape[1], x.shape[3], torch.float16, {}, "x", block)
            tensors = codec.encode(x)
            e, size = x - codec.decode(tensors), sum(t.nbytes for t in tensors.values())
            B, H, T, D = e.shape
            wide = e.transpose(1, 2).reshape(B, 1, T, H * D)
            long = e.unflatten(2, (-1, block)).transpose(1, 2).reshape(B, 1, T * H, D)
            for kind, m, span in (("A", wide, block), ("B", long, H * block)):
                more, rest = _factorised(m, span)
                name = f"block {block}, S 0 %, R 2 x 16 bits, heads share {kind}"
                all_in = 8 * (size + more) / x.numel(), relative(rest, x)
                found.setdefault(name, []).append(all_in)
    return {n: (fmean(f[0] for f in v), fmean(f[1] for f in v)) for n, v in found.items()}


def _factorised(m: Tensor, span: int) -> tuple[int, Tensor]:
    """Bytes of two columns for every `span` rows of m [B, 1, T, D], and what they leave."""
    fmt = Factors(span, 3, 0, torch.float16)
    factors = fit_low_rank(m, fmt, 2)
    taken = add_low_rank(torch.zeros_like(m), *read_factors(factors, fmt, m.shape[3]))
    return sum(t.nbytes for t in factors.values()), m - taken


def pays(log: Run) -> None:
    """Bits of precision that a bit spent on each part brings, by head dim and block."""
    sources = dict(_sources())
    columns = ("what", "side", "block", *PARTS)
    for bits in (2, 4):
        rows = [
            [name, side, str(block), *(f"{w:.2f}" for w in _worth(pair[i], bits, block, i))]
            for name, pair in sources.items()
            for i, side in enumerate("kv")
            for block in (64, 128, 256)
        ]
        log.table(f"{bits} bits: half the log2 of the error removed, for a bit", columns, rows)


def _sources() -> Iterator[tuple[str, Pair]]:
    layers = captured()[::2]
    k, v = (torch.cat(side)[::3] for side in zip(*layers, strict=True))
    yield "tiny, 2 heads of 64", (k, v)
    joined = [x.transpose(1, 2).flatten(2).unsqueeze(1) for x in (k, v)]
    yield "tiny, both heads as one of 128", (joined[0], joined[1])
    for dim in (64, 128, 256):
        noise = torch.randn(2, 2, 2, 1024, dim)
        yield f"noise, 2 heads of {dim}", (noise[0], noise[1])


def _worth(x: Tensor, bits: int, block: int, side: int) -> Iterator[float]:
    size, left = measure(x, TensorCodec(quantizers(bits)[side]), block)
    for more, fraction, low in PARTS.values():
        spec = TensorCodec(quantizers(bits + more)[side], TopK(fraction) if fraction else None, low)
        spent, rest = measure(x, spec, block)
        yield 0.5 * math.log2(left / rest) / (spent - size)
