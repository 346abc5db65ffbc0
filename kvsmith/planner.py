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
from kvsmith.plans import Load, ModelFacts, Option, Plan
from kvsmith.sizes import CacheBytes, cache_bytes
from kvsmith.spec import CacheSpec
from kvsmith.spread import part_of, spec_of, spread

LIMIT = 10**12  # longest context that is looked for


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
