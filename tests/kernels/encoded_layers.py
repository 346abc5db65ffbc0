"""Layers with an encoded body for tests of attend_encoded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from kvsmith.codec import Codec
from kvsmith.geometry import LayerGeometry
from kvsmith.kernels.attend_encoded.api import Body, Logits, Rope, Side, Window
from kvsmith.layout import page_layout
from kvsmith.pages import new_page, write
from kvsmith.spec import NUQ, CodecSpec, LowRank, StaticThreshold, TensorCodec, TopK, Uniform

CODECS = {
    "nuq": (
        lambda b: TensorCodec(
            NUQ(bits=b, axis="channel", range="calibrated"),
            StaticThreshold(0.03, select="largest_error"),
        ),
        lambda b: TensorCodec(NUQ(bits=b), TopK(0.03)),
    ),
    "nuq_plain": (
        lambda b: TensorCodec(NUQ(bits=b, axis="channel", range="calibrated")),
        lambda b: TensorCodec(NUQ(bits=b)),
    ),
    "uniform": (lambda b: TensorCodec(Uniform(bits=b)), lambda b: TensorCodec(Uniform(bits=b))),
    "grouped": (
        lambda b: TensorCodec(Uniform(bits=b, axis="channel", group_size=32)),
        lambda b: TensorCodec(Uniform(bits=b, group_size=16)),
    ),
    "channels": (
        lambda b: TensorCodec(Uniform(bits=b, group_size=16)),
        lambda b: TensorCodec(
            Uniform(bits=b, axis="channel", range="calibrated"), StaticThreshold(0.02)
        ),
    ),
    "gear": (
        lambda b: TensorCodec(
            Uniform(bits=b, axis="channel", group_size=32), TopK(0.05), LowRank(3)
        ),
        lambda b: TensorCodec(Uniform(bits=b), TopK(0.03), LowRank(2)),
    ),
    "gear_few": (
        lambda b: TensorCodec(Uniform(bits=b), None, LowRank(2, bits=4)),
        lambda b: TensorCodec(Uniform(bits=b, group_size=16), None, LowRank(5, bits=b)),
    ),
}


@dataclass
class Layer:
    """Arguments of attend_encoded."""

    body: Body
    sinks: Window
    recent: Window
    query: int
    rope: Rope | None
    first: torch.Tensor | None


def make_layer(
    codec: str,
    bits: int,
    length: int,
    *,
    heads: int = 2,
    dim: int = 64,
    v_dim: int | None = None,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    rope: bool = True,
    padding: list[int] | None = None,
    sinks: int = 4,
    recent: int = 16,
    block: int = 16,
    page: int = 64,
    queries: int = 1,
    freed: int = 0,
    offset: int = 0,
    turned: tuple[bool, bool] = (False, False),
) -> Layer:
    """A layer that holds `length` tokens, the queries' own included."""
    v_dim = v_dim or dim
    make_k, make_v = CODECS[codec]
    spec = CodecSpec(make_k(bits), make_v(bits), sinks=sinks, recent=recent, block_size=block)
    k = torch.randn(batch, heads, length, dim).to(dtype)
    v = torch.randn(batch, heads, length, v_dim).to(dtype)
    k[:, :, :, 3] *= 8
    encoded = max(0, length - sinks - recent) // block * block
    sides, codecs = [], []
    bases = []
    for name, part, x, turn in (("k", spec.k, k, turned[0]), ("v", spec.v, v, turned[1])):
        basis = torch.linalg.qr(torch.randn(heads, x.shape[3], x.shape[3])).Q if turn else None
        bases.append(x if basis is None else (x.float() @ basis).to(dtype))
        c = Codec(part, heads, x.shape[3], torch.float16, _parameters(part, x), name, block)
        codecs.append(c)
        rank = part.low_rank.rank if part.low_rank else 0
        sides.append(Side(c.format, c.tables, x.shape[3], basis, c.factors, rank))
    layout = page_layout(spec, LayerGeometry(heads, heads, dim, v_dim), page, dtype)
    pages = []
    for at in range(0, encoded, page):
        one, end = new_page(layout, k), min(encoded, at + page)
        for c, tensors, x in zip(codecs, one.sides, bases, strict=True):
            write(tensors, c, 0, x[:, :, sinks + at : sinks + end])
        pages.append(one)
    begin = min(freed, len(pages)) * page
    first = None if padding is None else torch.tensor(padding)
    start = torch.zeros(batch, dtype=torch.int64) if first is None else first
    ids = torch.arange(length) + offset - start[:, None]
    own_columns = (start[:, None] + torch.arange(sinks)).clamp(max=length - 1)
    rows = torch.arange(batch)[:, None]

    def dense(x: torch.Tensor) -> torch.Tensor:
        return x[rows, :, own_columns].transpose(1, 2).contiguous()

    tail = min(sinks + encoded, length)
    return Layer(
        Body(pages[begin // page :], None, heads, page, begin, encoded, *sides),
        Window(dense(k), dense(v), ids.gather(1, own_columns), 0, sinks),
        Window(
            _room(k[:, :, tail:], recent + block),
            _room(v[:, :, tail:], recent + block),
            torch.nn.functional.pad(ids[:, tail:], (0, recent + block - length + tail)),
            tail,
            length - tail,
        ),
        length - queries,
        _rope(dim, offset - start) if rope else None,
        first,
    )


def _parameters(part: TensorCodec, x: torch.Tensor) -> dict[str, torch.Tensor]:
    own: dict[str, Any] = {}
    q = part.quantizer
    if isinstance(q, NUQ):
        lut = torch.rand(2**q.bits).mul(2).sub(1).sort().values
        own |= {"lut": lut, "edges": (lut[1:] + lut[:-1]) / 2}
    if q.range == "calibrated":
        own["scale"] = x.float().abs().amax((0, 2)) * 0.8
        own["zero"] = x.float().mean((0, 2))
    return own


def _room(x: torch.Tensor, size: int) -> torch.Tensor:
    """A buffer with room behind the tokens, which must not be read."""
    full = torch.full((*x.shape[:2], size, x.shape[3]), float("nan"), dtype=x.dtype)
    full[:, :, : x.shape[2]] = x
    return full


def _rope(dim: int, shift: torch.Tensor) -> Rope:
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return Rope(frequency / (2 * math.pi), 1.0, shift)


def logits(dim: int, **given: Any) -> Logits:
    """Logits with the usual scale."""
    return Logits(dim**-0.5, **given)
