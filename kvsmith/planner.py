"""What fits on a device: cache, weights, activations and reserve; what a decoding step must move.

    cache(tokens) + weights + activations + reserve <= memory
    seconds a token >= (weights read + cache read) / bandwidth

Bytes of caches come from `sizes.cache_bytes`, the arithmetic that the runtime allocates by. The
seconds are a floor (a roofline): they leave out computation, launches and what bandwidth falls
short of its peak. A layer that reads another's tokens stores none but reads all of them, so sharing
saves memory and no time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from kvsmith.attention import CHUNK_ELEMENTS, LOGIT_ELEMENTS
from kvsmith.devices import Device
from kvsmith.errors import explain
from kvsmith.geometry import LayerGeometry, ModelGeometry
from kvsmith.layout import check_geometry
from kvsmith.sizes import CacheBytes, cache_bytes
from kvsmith.spec import CacheSpec
from kvsmith.spread import part_of, spec_of, spread

RESERVE = 0.06  # share of a device: driver, allocator, fragments
PREFILL = 2048  # tokens of a prompt that go through the model at once
LIMIT = 10**12  # longest context that is looked for


@dataclass(frozen=True)
class ModelFacts:
    """What a plan needs of a model.

    Attributes:
        name: word for tables.
        geometry: layers that keep keys and values.
        rope: whether keys are rotated by position.
        weights: parameters, all.
        read: parameters that a decoding step reads: all but an input embedding of its own.
        hidden, inner, vocab: widths of the residual stream, the feed-forward layer, the logits.
        positions: the longest context it was made for; None where it has no limit.
        fixed: layers whose state does not grow with the context (linear attention, Mamba).
    """

    name: str
    geometry: ModelGeometry
    rope: bool
    weights: int
    read: int
    hidden: int
    inner: int
    vocab: int
    positions: int | None
    fixed: int = 0


@dataclass(frozen=True)
class Load:
    """What is asked of a device.

    Attributes:
        context: tokens of each row.
        batch: rows.
        dtype: of weights, activations and dense tokens.
        prefill: tokens of a prompt that go through the model at once.
        reserve: share of the device's memory that is left alone, in [0, 1).
        devices: equal ones that layers are spread over, in order.
    """

    context: int
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    prefill: int = PREFILL
    reserve: float = RESERVE
    devices: int = 1

    def __post_init__(self) -> None:
        for name in ("context", "batch", "prefill", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(explain(name, "value", "positive", getattr(self, name)))
        if not 0 <= self.reserve < 1:
            raise ValueError(explain("reserve", "share of memory", "in [0, 1)", self.reserve))


@dataclass(frozen=True)
class Option:
    """One cache on the device.

    Attributes:
        codec: its name.
        spec: what it is.
        bits: 8 * cache over the key and value elements of all tokens; below the codec's where
            sliding windows drop tokens.
        bytes_per_token: bytes that one more token of a row takes, at any length.
        cache: bytes of all rows at the context.
        read: bytes of the cache that one decoding step reads at the context, all rows.
        seconds: floor of a decoding step.
        longest: tokens a row may have with this batch, 0 where not even one fits.
        rows: rows that fit at the context.
        fits: whether what was asked for fits.
        fullest: bytes of weights, activations and cache on the device that has most of them.
    """

    codec: str
    spec: CacheSpec
    bits: float
    bytes_per_token: float
    cache: int
    read: int
    seconds: float
    longest: int
    rows: int
    fits: bool
    fullest: int


@dataclass(frozen=True)
class Plan:
    """A model on a device, or on several.

    Attributes:
        model, device, load: what was asked.
        factor: layers that share one owner's tokens; 1 as the model is.
        weights: bytes, of all devices.
        activations, reserve: bytes, of each device.
        room: bytes left for the cache on all devices; negative where the weights alone do not fit.
        options: one a codec, in the order given.
        notes: what a reader must know, a sentence each.
    """

    model: ModelFacts
    device: Device
    load: Load
    factor: int
    weights: int
    activations: int
    reserve: int
    room: int
    options: tuple[Option, ...]
    notes: tuple[str, ...]

    def __getitem__(self, codec: str) -> Option:
        """The option of a codec.

        Raises:
            KeyError: it is not in the plan.
        """
        for option in self.options:
            if option.codec == codec:
                return option
        raise KeyError(codec)


def make_plan(
    model: ModelFacts,
    device: Device,
    load: Load,
    codecs: Mapping[str, CacheSpec],
    factor: int = 1,
) -> Plan:
    """Plan caches for a model on a device.

    Args:
        model: see `hf.shapes.model_facts`.
        device: see `devices`.
        load: what is asked.
        codecs: name -> cache. Those that the model's shape cannot hold are left out and noted.
        factor: layers in a row that share the first one's tokens (cross-layer attention).

    Returns:
        Plan.

    Raises:
        ValueError: a factor that the layers cannot share by, or more devices than they fill.
    """
    model = replace(model, geometry=share(model.geometry, factor))
    spread(model.geometry, load.devices)
    weights = model.weights * load.dtype.itemsize
    used = activations(model, load, load.batch)
    reserve = int(load.reserve * device.memory)
    notes = _notes(model, load, factor)
    options = []
    for name, spec in codecs.items():
        try:
            check_geometry(spec, model.geometry)
        except ValueError as error:
            notes.append(f"{name} is left out: {error}")
            continue
        options.append(_option(name, spec, model, device, load))
    room = load.devices * (device.memory - used - reserve) - weights
    return Plan(
        model, device, load, factor, weights, used, reserve, room, tuple(options), tuple(notes)
    )


def share(shape: ModelGeometry, factor: int) -> ModelGeometry:
    """Let each run of `factor` owning layers of equal shape read its first one's tokens.

    Raises:
        ValueError: a factor below 1 or above the number of layers.
    """
    if not 1 <= factor <= len(shape.layers):
        expected = f"between 1 and {len(shape.layers)} layers"
        raise ValueError(explain("factor", "value", expected, factor))
    owner, runs = list(shape.owner), dict[LayerGeometry, tuple[int, int]]()
    for i in shape.owners:
        first, count = runs.get(shape.layers[i], (i, 0))
        first, count = (first, count + 1) if 0 < count < factor else (i, 1)
        runs[shape.layers[i]] = first, count
        owner[i] = first
    return ModelGeometry(shape.layers, tuple(owner[o] for o in owner))


def activations(model: ModelFacts, load: Load, batch: int) -> int:
    """An estimate of the largest temporary tensors of a forward pass through the runtime, bytes.

    The residual stream four times over, queries, keys and values, three feed-forward tensors, all
    of one pass of a prompt; logits of the last token in float32; the chunk of decoded keys and
    values and the block of attention logits that `attention.py` works in.
    """
    layer = max(model.geometry.layers, key=lambda g: g.query_heads * g.k_dim + g.elements)
    width = 4 * model.hidden + 2 * layer.query_heads * layer.k_dim + layer.elements
    tokens = batch * min(load.context, load.prefill)
    step = tokens * (width + 3 * model.inner) * load.dtype.itemsize
    return step + 4 * (batch * model.vocab + 2 * CHUNK_ELEMENTS + 2 * LOGIT_ELEMENTS)


def _option(name: str, spec: CacheSpec, model: ModelFacts, device: Device, load: Load) -> Option:
    shape, memory = model.geometry, device.memory - int(load.reserve * device.memory)
    devices = parts(model, spec, load)

    def size(batch: int, tokens: int) -> int:
        return held(model, spec, batch, tokens, load.dtype).total

    def most(batch: int, tokens: int) -> int:
        used = activations(model, replace(load, context=tokens), batch)
        return used + max(p.nbytes(batch, tokens) for p in devices)

    def fits(batch: int, tokens: int) -> bool:
        return most(batch, tokens) <= memory

    cache = size(load.batch, load.context)
    read_by = replace(model, geometry=readers(shape))
    seen = held(read_by, spec, load.batch, load.context, load.dtype)
    read = seen.body + seen.windows + seen.positions
    seconds = (model.read * load.dtype.itemsize + read) / device.bandwidth
    page = spec.page_size
    far = 64 * page + max((g.window or 0 for g in shape.layers), default=0)
    one_more = (size(1, far + page) - size(1, far)) / page
    stored = load.batch * load.context * shape.elements
    return Option(
        codec=name,
        spec=spec,
        bits=8 * cache / stored,
        bytes_per_token=one_more,
        cache=cache,
        read=read,
        seconds=seconds,
        longest=_largest(lambda tokens: fits(load.batch, tokens)),
        rows=_largest(lambda batch: fits(batch, load.context)),
        fits=fits(load.batch, load.context),
        fullest=most(load.batch, load.context),
    )


@dataclass(frozen=True)
class Part:
    """What one of several devices holds.

    Attributes:
        model: its layers alone.
        spec: their cache.
        weights: bytes.
        dtype: of dense tokens.
        first: whether position ids lie here.
    """

    model: ModelFacts
    spec: CacheSpec
    weights: int
    dtype: torch.dtype
    first: bool

    def nbytes(self, batch: int, tokens: int) -> int:
        """Bytes of weights and cache."""
        cache = held(self.model, self.spec, batch, tokens, self.dtype)
        return self.weights + cache.total - (0 if self.first else cache.positions)


def parts(model: ModelFacts, spec: CacheSpec, load: Load) -> tuple[Part, ...]:
    """What each device holds, equal ones once: its layers, the first the embedding and position
    ids too, the last the logits' matrix (if that is the embedding, a copy).
    """
    if load.devices == 1:
        return (Part(model, spec, model.weights * load.dtype.itemsize, load.dtype, True),)
    shape, table = model.geometry, model.hidden * model.vocab
    blocks = (model.weights - (model.weights - model.read) - table) / len(shape.layers)
    found: dict[Part, None] = {}
    for layers in spread(shape, load.devices):
        first, last = layers.start == 0, layers.stop == len(shape.layers)
        weights = blocks * len(layers) + table * (first + last)
        facts = replace(model, geometry=part_of(shape, layers))
        size = round(weights) * load.dtype.itemsize
        found[Part(facts, spec_of(spec, layers), size, load.dtype, first)] = None
    return tuple(found)


def held(
    model: ModelFacts, spec: CacheSpec, batch: int, tokens: int, dtype: torch.dtype
) -> CacheBytes:
    """Bytes of a cache with rows of equal length; see `sizes.cache_bytes`."""
    rotated = int(model.rope and spec.codec.key_domain == "pre")
    return cache_bytes(spec, model.geometry, batch, tokens, dtype, rotated)


def readers(shape: ModelGeometry) -> ModelGeometry:
    """The layers whose tokens a decoding step reads: every layer, its owner's."""
    return ModelGeometry(tuple(shape.layers[o] for o in shape.owner))


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number up to LIMIT that fits, for a test that fails for all larger ones."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= LIMIT and fits(high):
        low, high = high, 2 * high
    high = min(high, LIMIT + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _notes(model: ModelFacts, load: Load, factor: int) -> list[str]:
    notes = []
    if model.positions is not None and load.context > model.positions:
        notes.append(
            f"{load.context:,} tokens are beyond the {model.positions:,} positions that "
            f"{model.name} was made for: this counts bytes, not quality."
        )
    if factor > 1:
        notes.append(
            f"Layers share by {factor} only in a model trained or converted for it; memory falls, "
            "the bytes read in a step do not."
        )
    if load.devices > 1:
        notes.append(
            "A step passes the devices one after another: more of them hold more, and decode no "
            "faster."
        )
    if model.fixed:
        notes.append(f"{model.fixed} layers keep a state of fixed size, which is not counted.")
    return notes
