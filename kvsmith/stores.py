"""From a spec and parameters to the store of each layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvsmith.codec import Codec
from kvsmith.errors import explain
from kvsmith.eviction.policy import KeepAll
from kvsmith.eviction.store import EvictingStore
from kvsmith.geometry import ModelGeometry
from kvsmith.layout import DTYPES, evicting_layers, slot_heads
from kvsmith.less.features import feature_map
from kvsmith.less.spec import less_tensors
from kvsmith.less.state import State
from kvsmith.spec import CacheSpec
from kvsmith.store import LayerStore

Parameters = Mapping[str, torch.Tensor]


def make_store(
    spec: CacheSpec, geometry: ModelGeometry, layer: int, parameters: Parameters
) -> LayerStore | EvictingStore:
    """An empty store for one layer that owns its tokens.

    Args:
        spec: the cache.
        geometry: the model.
        layer: index of the layer.
        parameters: `layers.{i}.*` of the whole model.

    Raises:
        ValueError: a parameter is missing or has another shape.
    """
    shape, codec = geometry.layers[layer], spec.codec.at(layer)
    store, block = DTYPES[codec.store_dtype], codec.block_size
    evicts = layer in evicting_layers(spec, geometry)
    k, v = (
        Codec(
            part,
            slot_heads(part, shape.kv_heads) if evicts else shape.kv_heads,
            dim,
            store,
            _own(parameters, prefix),
            prefix,
            block,
        )
        for prefix, part, dim in (
            (f"layers.{layer}.k", codec.k, shape.k_dim),
            (f"layers.{layer}.v", codec.v, shape.v_dim),
        )
    )
    if isinstance(spec.eviction, KeepAll) or not evicts:
        return LayerStore(codec, shape, spec.page_size, k, v)
    state = _state(spec, geometry, layer, _own(parameters, f"layers.{layer}.less"))
    return EvictingStore(codec, shape, spec.eviction, k, v, state)


def _state(spec: CacheSpec, geometry: ModelGeometry, layer: int, own: Parameters) -> State | None:
    if spec.less is None:
        return None
    rank = spec.less.rank_of(evicting_layers(spec, geometry).index(layer))
    expected = less_tensors(spec.less.features, geometry.joined(layer), rank)
    for name, (shape, _) in expected.items():
        where = f"layers.{layer}.less.{name}"
        if name not in own:
            remedy = "Train it with train.py less=..., and export a bundle."
            raise ValueError(explain(where, "parameter", "present", "nothing", remedy))
        if tuple(own[name].shape) != shape:
            raise ValueError(explain(where, "shape", str(shape), str(tuple(own[name].shape))))
    tensors = {name: own[name] for name in expected}
    return State(feature_map(spec.less.features, tensors), rank, spec.less.store_dtype)


def _own(parameters: Parameters, prefix: str) -> dict[str, torch.Tensor]:
    return {n[len(prefix) + 1 :]: t for n, t in parameters.items() if n.startswith(f"{prefix}.")}
