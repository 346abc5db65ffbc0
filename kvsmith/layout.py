"""Which tensors a cache owns, where they lie in a page, and which of them a bundle holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod

import torch

from kvsmith.errors import explain
from kvsmith.eviction.policy import KeepAll
from kvsmith.geometry import LayerGeometry, ModelGeometry
from kvsmith.kernels.format import index_dtype
from kvsmith.kernels.pack.api import packed_bytes
from kvsmith.less.spec import less_tensors
from kvsmith.spec import CacheSpec, CodecSpec, Identity, LowRank, TensorCodec, TopK

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


def outlier_slots(codec: TensorCodec, heads: int, dim: int, block: int) -> int:
    """Outliers stored a token, N.

    Args:
        codec: the codec.
        heads: KV heads H.
        dim: channels of a head D.
        block: tokens that are encoded together.

    Returns:
        round(fraction * H * D); for extremes of channels what their outliers come to, rounded up.
    """
    if count := channel_slots(codec, block):
        return -(-count * heads * dim // block)
    return round(codec.fraction * heads * dim)


def channel_slots(codec: TensorCodec, block: int) -> int:
    """Outliers of a channel in a block, where channels are the vectors of `TopK`; else 0."""
    q = codec.quantizer
    if isinstance(q, Identity) or q.axis == "token" or not isinstance(codec.outliers, TopK):
        return 0
    return round(codec.fraction * block)


def parameter_tensors(codec: TensorCodec, heads: int, dim: int) -> dict[str, TensorInfo]:
    """Tensors that the bundle holds for the keys or the values of one layer.

    Args:
        codec: the codec.
        heads: KV heads H.
        dim: channels of a head D.

    Returns:
        name -> TensorInfo: `lut` [C] and `edges` [C-1] (normalised to [-1, 1]) for fitted tables;
        `scale` and `zero` [H, D] (units of the cached tensor) for calibrated ranges; `rotation`
        [H, D, D] where one is given.
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
    if codec.rotation == "given":
        tensors["rotation"] = TensorInfo(
            (heads, dim, dim), torch.float32, "orthogonal; channels of a head times it are stored"
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
    if slots := outlier_slots(codec, heads, dim, block):
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
    if codec.low_rank is not None:
        tensors |= _factor_tensors(codec.low_rank, heads, dim, tokens // block, block, store)
    return tensors


def _factor_tensors(
    part: LowRank, heads: int, dim: int, blocks: int, block: int, store: torch.dtype
) -> dict[str, TensorInfo]:
    shape = (heads, blocks, part.rank)
    if part.bits is None:
        return {
            "left": TensorInfo((*shape, block), store, "orthonormal columns of A"),
            "right": TensorInfo((*shape, dim), store, "columns of B, units of the cached tensor"),
        }
    sizes = [packed_bytes(n, part.bits) for n in (block, dim)]
    return {
        "left": TensorInfo((*shape, sizes[0]), torch.uint8, "packed codes of A"),
        "right": TensorInfo((*shape, sizes[1]), torch.uint8, "packed codes of B"),
        "factor_scale": TensorInfo(shape, store, "largest element of a column of A B^T"),
    }


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
            16-bit indices, or a state has no layer.
    """
    _check_less(spec, geometry)
    last = spec.codec.layers[-1].layer if spec.codec.layers else -1
    if last >= len(geometry.layers):
        expected = f"below the model's {len(geometry.layers)} layers"
        raise ValueError(explain("codec.layers", "index", expected, last))
    for i in geometry.owners:
        layer, sides = geometry.layers[i], spec.codec.at(i)
        for name, dim in (("k", layer.k_dim), ("v", layer.v_dim)):
            codec: TensorCodec = getattr(sides, name)
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
            block = spec.codec.block_size
            slots = outlier_slots(codec, layer.kv_heads, dim, block)
            if codec.low_rank is not None and codec.low_rank.largest > dim:
                expected = f"at most head dim {dim} (layer {i})"
                raise ValueError(
                    explain(f"codec.{name}.low_rank", "rank", expected, codec.low_rank.largest)
                )
            if slots and block * max(dim, slots) >= 65536:
                raise ValueError(
                    explain(
                        f"layer {i}",
                        "block_size",
                        f"below {65536 // max(dim, slots)} with outliers of {name}",
                        block,
                    )
                )


def evicting_layers(spec: CacheSpec, geometry: ModelGeometry) -> tuple[int, ...]:
    """Layers whose tokens a policy evicts; a layer with a sliding window forgets by itself."""
    if isinstance(spec.eviction, KeepAll):
        return ()
    return tuple(i for i in geometry.owners if geometry.layers[i].window is None)


def slot_heads(codec: TensorCodec, heads: int) -> int:
    """Heads that are encoded together in an evicting layer, where the tokens of a slot differ by
    head: one, where a codec would share a range or a choice of outliers among them.
    """
    q = codec.quantizer
    shared = not isinstance(q, Identity) and q.axis == "token"
    shared &= isinstance(codec.outliers, TopK) or getattr(q, "group_size", None) is None
    return 1 if shared else heads


def less_parameters(spec: CacheSpec, geometry: ModelGeometry) -> dict[str, TensorInfo]:
    """Tensors of all layers' states, `layers.{i}.less.{name}`."""
    tensors: dict[str, TensorInfo] = {}
    if spec.less is None:
        return tensors
    for index, i in enumerate(evicting_layers(spec, geometry)):
        own = less_tensors(spec.less.features, geometry.joined(i), spec.less.rank_of(index))
        for name, (shape, unit) in own.items():
            tensors[f"layers.{i}.less.{name}"] = TensorInfo(shape, torch.float32, unit)
    return tensors


def _check_less(spec: CacheSpec, geometry: ModelGeometry) -> None:
    layers = evicting_layers(spec, geometry)
    if spec.less is None:
        return
    if not layers:
        expected = "one with layers without a sliding window"
        raise ValueError(explain("cache.less", "model", expected, "none"))
    if len(spec.less.ranks) not in (0, len(layers)):
        expected = f"one for each of the {len(layers)} layers that evict"
        raise ValueError(explain("cache.less", "ranks", expected, len(spec.less.ranks)))


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
    """Lay out a page of `tokens` tokens of one layer, whose codec alone is `codec`; tensors start
    at multiples of 16 bytes.
    """
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
