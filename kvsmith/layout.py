"""Which tensors a cache owns, and the bytes they take.

The runtime allocates exactly what `page_tensors` lists, so `cache_bytes` and the allocated bytes
agree to the byte.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from math import prod

import torch

from kvsmith.errors import explain
from kvsmith.geometry import LayerGeometry, ModelGeometry
from kvsmith.kernels.format import index_dtype
from kvsmith.kernels.pack.api import packed_bytes
from kvsmith.spec import CacheSpec, CodecSpec, Identity, TensorCodec

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class TensorInfo:
    """Shape, dtype and unit of one tensor.

    Attributes:
        shape: sizes; page tensors leave the leading batch dimension out.
        dtype: torch dtype.
        unit: what the numbers mean.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    unit: str

    @property
    def nbytes(self) -> int:
        """Bytes of one such tensor (of one batch row for page tensors)."""
        return prod(self.shape) * self.dtype.itemsize


def outlier_slots(codec: TensorCodec, heads: int, dim: int) -> int:
    """Outliers stored a token, N = round(fraction * heads * dim)."""
    return round(codec.fraction * heads * dim)


def parameter_tensors(codec: TensorCodec, heads: int, dim: int) -> dict[str, TensorInfo]:
    """Tensors that the bundle holds for the keys or the values of one layer.

    Args:
        codec: the codec.
        heads: KV heads H.
        dim: channels of a head D.

    Returns:
        name -> TensorInfo: `lut` [C] and `edges` [C-1] (normalised to [-1, 1]) for fitted tables;
        `scale` and `zero` [H, D] (units of the cached tensor) for calibrated ranges.
    """
    q = codec.quantizer
    if isinstance(q, Identity):
        return {}
    tensors = {}
    if q.kind == "nuq" and q.table == "fitted":
        tensors["lut"] = TensorInfo((2**q.bits,), torch.float32, "normalised value of a code")
        tensors["edges"] = TensorInfo(
            (2**q.bits - 1,), torch.float32, "normalised boundary between codes"
        )
    if q.range == "calibrated":
        tensors["scale"] = TensorInfo(
            (heads, dim), torch.float32, "half width of the channel's range"
        )
        tensors["zero"] = TensorInfo((heads, dim), torch.float32, "centre of the channel's range")
    return tensors


def page_tensors(
    codec: TensorCodec,
    heads: int,
    dim: int,
    tokens: int,
    block: int,
    store: torch.dtype,
    dense: torch.dtype,
) -> dict[str, TensorInfo]:
    """Tensors that hold `tokens` encoded tokens of one batch row.

    Args:
        codec: the codec.
        heads: KV heads H.
        dim: channels of a head D.
        tokens: page length T.
        block: tokens that are encoded together.
        store: dtype of ranges and corrections.
        dense: dtype of unquantized elements.

    Returns:
        name -> TensorInfo without the batch dimension: `dense` [H, T, D] for the identity, else
        `codes` [H, T, bytes] uint8, `scale`/`zero` for online ranges, `index`/`value` [T / block,
        block * N] and `start` [T / block, H + 1] for outliers.
    """
    q = codec.quantizer
    if isinstance(q, Identity):
        return {"dense": TensorInfo((heads, tokens, dim), dense, "cached element")}
    tensors = {
        "codes": TensorInfo((heads, tokens, packed_bytes(dim, q.bits)), torch.uint8, "packed codes")
    }
    if q.range == "online":
        shape = _range_shape(q.axis, q.group_size, heads, tokens, dim)
        tensors["scale"] = TensorInfo(shape, store, "half width of the range")
        tensors["zero"] = TensorInfo(shape, store, "centre of the range")
    if slots := outlier_slots(codec, heads, dim):
        blocks, each = tokens // block, block * slots
        tensors["index"] = TensorInfo(
            (blocks, each), index_dtype(block * dim - 1), "token in block * D + channel, unsigned"
        )
        tensors["value"] = TensorInfo(
            (blocks, each), store, "correction added to the decoded element"
        )
        tensors["start"] = TensorInfo(
            (blocks, heads + 1), index_dtype(each), "first correction of each head, unsigned"
        )
    return tensors


def _range_shape(
    axis: str, group: int | None, heads: int, tokens: int, dim: int
) -> tuple[int, ...]:
    if axis == "channel":
        assert group is not None
        return (heads, tokens // group, dim)
    return (tokens,) if group is None else (heads, tokens, dim // group)


def check_geometry(spec: CacheSpec, geometry: ModelGeometry) -> None:
    """Refuse a codec that the model's shape cannot hold.

    Raises:
        ValueError: a channel group does not divide the head dim, or the outliers of a block exceed
            16-bit indices.
    """
    for i in geometry.owners:
        layer = geometry.layers[i]
        for name, dim in (("k", layer.k_dim), ("v", layer.v_dim)):
            codec: TensorCodec = getattr(spec.codec, name)
            q = codec.quantizer
            where = f"codec.{name}.quantizer.group_size"
            if (
                not isinstance(q, Identity)
                and q.axis == "token"
                and q.group_size
                and dim % q.group_size
            ):
                raise ValueError(
                    explain(
                        where, "group", f"a divisor of head dim {dim} (layer {i})", q.group_size
                    )
                )
            block, slots = spec.codec.block_size, outlier_slots(codec, layer.kv_heads, dim)
            if slots and block * max(dim, slots) >= 65536:
                raise ValueError(
                    explain(
                        f"layer {i}",
                        "block_size",
                        f"below {65536 // max(dim, slots)} with outliers of {name}",
                        block,
                    )
                )


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of a cache by what they hold.

    Attributes:
        body: pages of encoded tokens.
        windows: dense sinks and recent tokens.
        parameters: codebooks and calibrated ranges, shared by all rows.
        positions: position ids of the cached tokens.
    """

    body: int
    windows: int
    parameters: int
    positions: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.body + self.windows + self.parameters + self.positions


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a page.

    Attributes:
        offset: first byte in a row of the page.
        info: shape, without the batch dimension, and dtype.
    """

    offset: int
    info: TensorInfo


@dataclass(frozen=True)
class PageLayout:
    """A page: one buffer [B, nbytes] uint8 that holds encoded keys and values of a run of tokens.

    Attributes:
        k, v: name -> place of every tensor of the keys and of the values.
        nbytes: bytes of a row, a multiple of 16.
    """

    k: dict[str, Place]
    v: dict[str, Place]
    nbytes: int


@cache
def page_layout(
    codec: CodecSpec, layer: LayerGeometry, tokens: int, dense: torch.dtype
) -> PageLayout:
    """Lay out a page of `tokens` tokens of one layer; tensors start at multiples of 16 bytes."""
    sides: list[dict[str, Place]] = []
    end = 0
    for part, dim in ((codec.k, layer.k_dim), (codec.v, layer.v_dim)):
        infos = page_tensors(
            part,
            layer.kv_heads,
            dim,
            tokens,
            codec.block_size,
            DTYPES[codec.store_dtype],
            dense,
        )
        places = {}
        for name, info in infos.items():
            places[name] = Place(end, info)
            end += -(-info.nbytes // 16) * 16
        sides.append(places)
    return PageLayout(sides[0], sides[1], end)


def table_bytes(codec: TensorCodec, heads: int, dim: int) -> int:
    """Bytes of a codebook with its boundaries, and of calibrated ranges, as the runtime holds them
    (float32).
    """
    q = codec.quantizer
    if isinstance(q, Identity):
        return 0
    ranges = 2 * heads * dim if q.range == "calibrated" else 0
    return 4 * (2 ** (q.bits + 1) - 1 + ranges)


def encoded_tokens(codec: CodecSpec, tokens: int) -> int:
    """Tokens in the body once `tokens` have been appended."""
    return max(0, tokens - codec.sinks - codec.recent) // codec.block_size * codec.block_size


def held_pages(codec: CodecSpec, page: int, tokens: int, window: int | None) -> int:
    """Pages that a layer holds once `tokens` have been appended in one step.

    Args:
        codec: the codec.
        page: tokens of a page.
        tokens: tokens appended.
        window: tokens a query can see back, None for all. Pages that no query can see are freed,
            but for one; where tokens come one by one, that happens a token later.
    """
    pages = -(-encoded_tokens(codec, tokens) // page)
    if window is None:
        return pages
    passed = (tokens - window - codec.sinks) // page - 1
    return pages - min(max(passed, 0), pages)


def cache_bytes(
    spec: CacheSpec,
    geometry: ModelGeometry,
    batch: int,
    tokens: int,
    dense: torch.dtype,
    position_rows: int = 1,
) -> CacheBytes:
    """Bytes that a cache holds once `tokens` tokens have been appended to each row.

    Args:
        spec: the cache.
        geometry: the model.
        batch: rows B.
        tokens: tokens appended to each row.
        dense: dtype of the model's keys and values.
        position_rows: rows of position ids: 0 for a model without RoPE (or keys stored after it), 1
            where all batch rows share their positions, else B.

    Returns:
        CacheBytes; equal to the allocated bytes of the runtime's cache (see `held_pages` for layers
        with a sliding window).
    """
    codec, page = spec.codec, spec.page_size
    dense_tokens = codec.sinks + codec.recent + codec.block_size
    layers = Counter(geometry.layers[i] for i in geometry.owners)
    body = batch * sum(
        n * held_pages(codec, page, tokens, g.window) * page_layout(codec, g, page, dense).nbytes
        for g, n in layers.items()
    )
    windows = batch * dense_tokens * geometry.elements * dense.itemsize
    parameters = sum(
        n * table_bytes(part, g.kv_heads, dim)
        for g, n in layers.items()
        for part, dim in ((codec.k, g.k_dim), (codec.v, g.v_dim))
    )
    positions = position_rows * -(-tokens // page) * page * torch.int32.itemsize
    return CacheBytes(body, windows, parameters, positions)


def bits_per_element(
    spec: CacheSpec, geometry: ModelGeometry, batch: int, tokens: int, dense: torch.dtype
) -> float:
    """All-in bits an element at a stated length: every allocated byte over the elements it stands
    for.
    """
    total = cache_bytes(spec, geometry, batch, tokens, dense).total
    return 8 * total / (batch * tokens * geometry.elements)
