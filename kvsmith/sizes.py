"""The bytes that a cache takes.

The runtime allocates exactly what `layout.py` lists, so `cache_bytes` and the allocated bytes agree
to the byte.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace

import torch

from kvsmith.eviction.policy import KeepAll
from kvsmith.geometry import LayerGeometry, ModelGeometry
from kvsmith.layout import (
    DTYPES,
    evicting_layers,
    less_parameters,
    page_layout,
    page_tensors,
    slot_heads,
)
from kvsmith.spec import CacheSpec, CodecSpec, Identity, TensorCodec, slot_tokens

# Bytes of a state's value, and of the scale of its R values.
STATE_BYTES = {"float16": (2, 0), "float32": (4, 0), "int8": (1, 4)}


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of a cache by what they hold.

    Not counted is what kernels are told beside the tokens: the address of each page (8 bytes, room
    for 64 at least) and the frequencies of RoPE, once the first step has been decoded.

    Attributes:
        body: pages of encoded tokens.
        windows: dense sinks and recent tokens.
        parameters: codebooks and calibrated ranges, shared by all rows.
        positions: position ids of the cached tokens.
        eviction: columns and scores of the tokens that evicting layers keep.
        state: what remains of evicted tokens.
    """

    body: int
    windows: int
    parameters: int
    positions: int
    eviction: int = 0
    state: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        kept = self.body + self.windows + self.eviction + self.state
        return kept + self.parameters + self.positions

    def plus(self, other: CacheBytes) -> CacheBytes:
        """The bytes of both."""
        names = (f.name for f in fields(self))
        return CacheBytes(**{n: getattr(self, n) + getattr(other, n) for n in names})


def table_bytes(codec: TensorCodec, heads: int, dim: int) -> int:
    """Bytes of a codebook with its boundaries, and of calibrated ranges, as the runtime holds them
    (float32).
    """
    q = codec.quantizer
    if isinstance(q, Identity):
        return 0
    ranges = 2 * heads * dim if q.range == "calibrated" else 0
    turns = heads * dim * dim if codec.rotation == "given" else 0
    return 4 * (2 ** (q.bits + 1) - 1 + ranges + turns)


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
    encoded = encoded_tokens(codec, tokens)
    passed = 0 if window is None else (tokens - window - codec.sinks) // page - 1
    return -(-encoded // page) - min(max(passed, 0), encoded // page)


def cache_bytes(
    spec: CacheSpec,
    geometry: ModelGeometry,
    batch: int,
    tokens: int,
    dense: torch.dtype,
    position_rows: int = 1,
    prompt: int | None = None,
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
        prompt: tokens of the first step, whose pages may have a low rank of their own; None is
            `tokens`.

    Returns:
        CacheBytes; equal to the allocated bytes of the runtime's cache (see `held_pages` for layers
        with a sliding window).
    """
    codec, page = spec.codec, spec.page_size
    evicting = evicting_layers(spec, geometry)
    owners = Counter((geometry.layers[i], codec.at(i), i in evicting) for i in geometry.owners)
    lengths = (tokens, tokens if prompt is None else prompt)
    body = batch * sum(
        n * _page_bytes(c, g, page, lengths, dense)
        for (g, c, evicts), n in owners.items()
        if not evicts
    )
    windows = (batch * dense.itemsize) * sum(
        n * g.elements * (c.sinks + c.recent + c.block_size)
        for (g, c, evicts), n in owners.items()
        if not evicts
    )
    parameters = sum(t.nbytes for t in less_parameters(spec, geometry).values())
    for (g, c, _), n in owners.items():
        parameters += n * table_bytes(c.k, g.kv_heads, g.k_dim)
        parameters += n * table_bytes(c.v, g.kv_heads, g.v_dim)
    positions = position_rows * -(-tokens // page) * page * torch.int32.itemsize
    total = CacheBytes(body, windows, parameters, positions)
    for index, i in enumerate(evicting):
        own = replace(spec, codec=codec.at(i))
        total = total.plus(_evicting_bytes(own, geometry.layers[i], index, batch, dense))
    return total


def _page_bytes(
    codec: CodecSpec, layer: LayerGeometry, page: int, lengths: tuple[int, int], dense: torch.dtype
) -> int:
    """Bytes of a layer's pages in one row; lengths: tokens, and those of them in the first step."""
    tokens, prompt = lengths
    held = held_pages(codec, page, tokens, layer.window)
    freed = -(-encoded_tokens(codec, tokens) // page) - held
    first = max(-(-encoded_tokens(codec, prompt) // page) - freed, 0)
    rest = (held - first) * page_layout(codec, layer, page, dense).nbytes
    return first * page_layout(codec.of_prompt(), layer, page, dense).nbytes + rest


def _evicting_bytes(
    spec: CacheSpec, layer: LayerGeometry, index: int, batch: int, dense: torch.dtype
) -> CacheBytes:
    """Bytes of one evicting layer, parameters aside; the same for every length."""
    policy, codec = spec.eviction, spec.codec
    assert not isinstance(policy, KeepAll)
    slots, heads = slot_tokens(codec, policy.budget), batch * layer.kv_heads
    body = 0
    for part, dim in ((codec.k, layer.k_dim), (codec.v, layer.v_dim)):
        own, store = slot_heads(part, layer.kv_heads), DTYPES[codec.store_dtype]
        infos = page_tensors(part, own, dim, slots, codec.block_size, store, dense)
        body += heads // own * sum(t.nbytes for t in infos.values())
    windows = batch * (policy.budget - slots) * layer.elements * dense.itemsize
    scored = policy.budget - codec.sinks if policy.scored else 0
    state = 0
    if spec.less is not None:
        rank = spec.less.rank_of(index)
        value, scale = STATE_BYTES[spec.less.store_dtype]
        state = heads * rank * (4 + value * layer.v_dim + scale)
    return CacheBytes(body, windows, 0, 0, heads * (4 * slots + 4 * scored), state)


def bits_per_element(
    spec: CacheSpec, geometry: ModelGeometry, batch: int, tokens: int, dense: torch.dtype
) -> float:
    """All-in bits an element at a stated length: every allocated byte over the elements it stands
    for.
    """
    total = cache_bytes(spec, geometry, batch, tokens, dense).total
    return 8 * total / (batch * tokens * geometry.elements)
