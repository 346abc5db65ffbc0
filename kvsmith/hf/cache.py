"""A compressed cache in the form that transformers models take."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from kvsmith.attention import Mask, Rotation, Scores, attend_store
from kvsmith.errors import explain
from kvsmith.eviction.attention import attend_kept, rotate_tokens
from kvsmith.eviction.store import EvictingStore
from kvsmith.eviction.tokens import Fold, Tokens
from kvsmith.geometry import ModelGeometry
from kvsmith.hf import dense
from kvsmith.hf.answer import answering, can_answer, mask_of
from kvsmith.hf.geometry import geometry
from kvsmith.hf.place import check_devices
from kvsmith.hf.seam import ATTACHED, HANDLE, Seam, SeamCache, attach
from kvsmith.key_rotation import KeyRotation
from kvsmith.layout import check_geometry, evicting_layers
from kvsmith.rope import CosSin, Positions
from kvsmith.sizes import CacheBytes
from kvsmith.spec import CacheSpec
from kvsmith.store import LayerStore
from kvsmith.stores import make_store


@dataclass
class LayerHandle:
    """Travels on the new keys from `update` to the attention function, and to layers that share
    them.

    Attributes:
        cache: whose tokens to attend to.
        layer: the layer that owns them.
        before: columns stored before the new tokens.
        rope: cos and sin of the new tokens; None where their keys are rotated.
    """

    cache: KVCache
    layer: int
    before: int
    rope: CosSin | None

    def attend(
        self,
        seam: Seam,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Mask,
        scores: Scores,
    ) -> torch.Tensor:
        """Rotate, where that was deferred, and attend; see `attention.attend_store`."""
        assert seam.call is not None
        cache, store = self.cache, self.cache.stores[self.layer]
        if seam.deferred:
            q, k = seam.turn(q, seam.call.rope), seam.turn(k, self.rope)
        rotate = cache.rotation(seam, q.dtype)
        if rotate.pairing is not None:
            q, k = rotate.pairing.arranged(q), rotate.pairing.arranged(k)
        if isinstance(store, EvictingStore):
            reader = cache.geometry.readers(self.layer).index(seam.layer)
            out, mass = attend_kept(q, k, v, store, mask, rotate, scores, reader)
            cache.note(self.layer, mass)
            if seam.layer == cache.last_reader[self.layer]:
                store.settle(cache.noted.pop(self.layer), _fold(store, rotate))
        else:
            out = attend_store(q, k, v, store, self.before, mask, rotate, scores)
        if seam.layer == len(cache.layers) - 1:
            cache.positions.end_pass()
        return out


def _fold(store: EvictingStore, rotate: Rotation) -> Fold | None:
    """Folds evicted tokens into the layer's state, if it has one."""
    state = store.state
    if state is None:
        return None

    def fold(gone: Tokens) -> None:
        state.fold(store.natural(rotate_tokens(rotate, gone)), gone.v, gone.columns >= 0)

    return fold


class KVCache(Cache, SeamCache):
    """A compressed KV cache that `transformers` models take as `past_key_values`.

    Made by `make_cache`, or by a bundle's `cache(model)`.
    """

    def __init__(
        self, spec: CacheSpec, shape: ModelGeometry, parameters: Mapping[str, torch.Tensor]
    ) -> None:
        check_geometry(spec, shape)
        self.spec, self.geometry = spec, shape
        self.positions = Positions(spec.page_size)
        self.stores = {i: make_store(spec, shape, i, parameters) for i in shape.owners}
        self.noted: dict[int, torch.Tensor | None] = {}
        # Tokens are evicted when the last layer that reads them has done so.
        self.last_reader = {owner: layer for layer, owner in enumerate(shape.owner)}
        # New keys and values of owners on their way to readers.
        self.handed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._calls: dict[int, Seam] = {}
        super().__init__(layers=[_Layer(self, i) for i in range(len(shape.layers))])

    # ... what the attention modules call

    def begin(self, seam: Seam) -> None:
        """Note what the hook of a layer saw; `update` of that layer follows."""
        self._calls[seam.layer] = seam

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens of a layer that owns its tokens; a layer that reads others' gets those.

        Args:
            key_states: [B, H, T, D] keys as they left the projection.
            value_states: [B, H, T, Dv] values.
            layer_idx: the layer.

        Returns:
            The new keys and values; the keys carry a handle to the stored ones.
        """
        seam = self._calls.pop(layer_idx, None)
        if seam is None or seam.call is None:
            raise ValueError(
                explain(
                    "cache",
                    "model",
                    "the one that the cache was made for",
                    "another",
                    "Make a cache for this model.",
                )
            )
        owner = self.geometry.owner[layer_idx]
        if owner == layer_idx:
            self.handed[owner] = self._store(seam, key_states, value_states)
        last = self.last_reader[owner] == layer_idx
        return self.handed.pop(owner) if last else self.handed[owner]

    def _store(
        self, seam: Seam, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert seam.call is not None
        layer_idx = seam.layer
        store, before = self.stores[layer_idx], self.stores[layer_idx].length
        if seam.call.positions is not None and self.positions.length == before and self._pre:
            self.positions.append(seam.call.positions, seam.attachment.frequencies())
        if not seam.deferred and isinstance(store, EvictingStore):
            return self._update_answering(seam, store, key_states, value_states)
        if not seam.deferred:
            return self._update_dense(seam, store, key_states, value_states)
        if self._pre and seam.uses_rope and seam.call.source is None:
            raise ValueError(
                explain(
                    f"layers.{layer_idx}",
                    "rotary module",
                    "seen by a hook, for keys before RoPE",
                    "nothing",
                    "Set codec.key_domain=post.",
                )
            )
        rotated = store.key_domain == "post"
        stored = seam.turn(key_states, seam.call.rope) if rotated else key_states
        if not rotated:
            store.arrange(seam.pairing(key_states))
        store.append(stored, value_states, getattr(seam.call.mask, "padding", None))
        handed = stored.view_as(stored)
        rope = None if rotated else seam.call.rope
        setattr(handed, HANDLE, LayerHandle(self, layer_idx, before, rope))
        return handed, value_states

    def _update_dense(
        self, seam: Seam, store: LayerStore | EvictingStore, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For modules that attend by themselves: all keys, rotated, and values of the layer."""
        assert isinstance(store, LayerStore)
        before, heads = store.length, store.geometry.kv_heads
        new = dense.one_of_each_group(k, heads)
        stored = dense.unrotate(seam, new) if self._pre else new
        assert seam.call is not None
        store.append(stored, dense.one_of_each_group(v, heads), dense.padding_of(seam.call.mask))
        old = dense.rebuild(store, before, self.rotation(seam, k.dtype), k, v)
        return dense.join(old[0], k), dense.join(old[1], v)

    def _update_answering(
        self, seam: Seam, store: EvictingStore, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For modules that attend by themselves, where tokens are evicted: see `hf.answer`."""
        assert seam.call is not None
        handle = LayerHandle(self, seam.layer, store.length, seam.call.rope)
        heads, mask = store.geometry.kv_heads, mask_of(seam.call.mask)
        new, values = dense.one_of_each_group(k, heads), dense.one_of_each_group(v, heads)
        stored = new if store.key_domain == "post" else dense.unrotate(seam, new)
        store.append(stored, values, dense.padding_of(seam.call.mask))
        scores = Scores(k.shape[-1] ** -0.5)

        def answer(q: torch.Tensor) -> torch.Tensor:
            return handle.attend(seam, q, new, values, mask, scores).transpose(1, 2)

        return answering(k, answer), v

    @property
    def _pre(self) -> bool:
        return self.spec.codec.key_domain == "pre"

    def rotation(self, seam: Seam, dtype: torch.dtype) -> KeyRotation:
        """RoPE of stored keys for one attention module, with cos and sin in `dtype`."""
        call = seam.call
        assert call is not None
        store = self.stores[self.geometry.owner[seam.layer]]
        source = call.source if store.key_domain == "pre" and seam.uses_rope else None
        return KeyRotation(self.positions, source, dtype, seam.rotate, store.pairing)

    def note(self, layer: int, mass: torch.Tensor | None) -> None:
        """Add up what the tokens of `layer` received from the layers that read them."""
        held = self.noted.get(layer)
        self.noted[layer] = mass if held is None or mass is None else held + mass

    # ... sizes

    def nbytes(self) -> int:
        """Bytes of every allocated tensor."""
        return self.bytes().total

    def bytes(self) -> CacheBytes:
        """Allocated bytes by what they hold."""
        sums = {name: 0 for name in ("body", "windows", "parameters", "eviction", "state")}
        for store in self.stores.values():
            for kind, tensor in store.tensors():
                sums[kind] += tensor.nbytes
        return CacheBytes(**sums, positions=self.positions.nbytes)

    def bits_per_element(self) -> float:
        """All-in bits per cached key or value element: 8 * nbytes over the elements of the tokens
        held.
        """
        stores = self.stores.values()
        elements = sum(s.batch_size * s.length * s.geometry.elements for s in stores)
        return 8 * self.nbytes() / elements if elements else 0.0

    # ... rearranging, as generate() asks for it

    def reset(self) -> None:
        """Forget every token and free its memory."""
        for store in self.stores.values():
            store.clear()
        self.positions.crop(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens.

        Args:
            tokens_to_remove: minus the number of tokens to forget, as transformers passes it; a
                positive number is the length to keep.
        """
        length = next(iter(self.stores.values())).length
        keep = length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        for store in self.stores.values():
            store.crop(max(keep, 0))
        self.positions.crop(max(keep, 0))

    def _map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for store in self.stores.values():
            store.map_rows(change)
        self.positions.map_rows(change)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Select rows [B] int64, for beam search."""
        self._map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select rows by index or boolean mask."""
        self._map_rows(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._map_rows(lambda t: t.repeat_interleave(repeats, dim=0))


class _Layer(CacheLayerMixin):
    """What transformers asks of a single layer; the tokens are in the cache's LayerStore."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: KVCache, index: int) -> None:
        super().__init__()
        self._cache = weakref.ref(cache)
        self._index = cache.geometry.owner[index]
        self.is_sliding = cache.geometry.layers[index].window is not None

    @property
    def _store(self) -> LayerStore | EvictingStore:
        cache = self._cache()
        assert cache is not None
        return cache.stores[self._index]

    @property
    def batch_size(self) -> int:
        """Rows, -1 before the first token."""
        return self._store.batch_size or -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: memory comes with the first tokens."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """See `KVCache.update`."""
        cache = self._cache()
        assert cache is not None
        return cache.update(key_states, value_states, self._index)

    def get_seq_length(self) -> int:
        """Columns stored, padding included."""
        return self._store.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns including the new ones, first column)."""
        return self._store.length + query_length, 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    get_max_cache_shape = get_max_length


def make_cache(
    model: PreTrainedModel, spec: CacheSpec, parameters: Mapping[str, torch.Tensor] | None = None
) -> KVCache:
    """An empty cache for a model.

    Args:
        model: a transformers model; it is attached on the first call.
        spec: what the cache is.
        parameters: `layers.{i}.{k,v}.{name}` -> float32 tensor, for codecs that own parameters.

    Returns:
        KVCache to pass as `past_key_values`.

    Raises:
        ValueError: the model, its shape or its place is not supported, or a parameter is missing.
    """
    attach(model)
    shape = geometry(model.config)
    check_devices(model, shape)
    if evicting_layers(spec, shape) and not ATTACHED[model].deferred:
        where = f"model ({model.config.model_type})"
        if not can_answer(model):
            expected = "by transformers' attention interface, for a cache that evicts"
            raise ValueError(explain(where, "attention", expected, "the module's own"))
        if len(shape.owners) != len(shape.layers):
            expected = "not shared, for a cache that evicts"
            raise ValueError(explain(where, "layers", expected, "kv_owner"))
    return KVCache(spec, shape, parameters or {})
