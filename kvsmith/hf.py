"""The seam to transformers: everything of the runtime that knows it stands here. Public interfaces only.

Deferred RoPE. A hook before each attention module keeps the position embeddings and passes identity ones (cos = 1,
sin = 0) while one of our caches is in use. Queries and keys so leave the projection exact and unrotated, `update`
stores keys before RoPE and hands them on with a handle to their layer, and the attention function registered here
rotates the query and the decoded keys with the model's own rotary function. Calls without our cache go to the
attention implementation the model had, unchanged.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvsmith.attention import Scores, attend_store
from kvsmith.codec import Codec
from kvsmith.errors import explain
from kvsmith.geometry import LayerGeometry, ModelGeometry
from kvsmith.layout import DTYPES, CacheBytes, check_geometry
from kvsmith.rope import CosSin, Positions, RotarySource, Rotate, rotation_function
from kvsmith.spec import CacheSpec
from kvsmith.store import LayerStore

NAME = "kvsmith"
Observer = Callable[[int, torch.Tensor, torch.Tensor], None]


# -- what a model looks like ----------------------------------------------------------------------


def geometry(config: Any) -> ModelGeometry:
    """Shape of a model's cache, from its configuration alone.

    Args:
        config: a transformers configuration.

    Returns:
        ModelGeometry.

    Raises:
        ValueError: the architecture keeps no plain keys and values (MLA), or is an encoder-decoder.
    """
    text = config.get_text_config(decoder=True)
    where = f"model ({config.model_type})"
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(explain(where, "architecture", "decoder-only", "an encoder-decoder"))
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(
            explain(
                where,
                "attention",
                "one with keys and values per head",
                "multi-head latent attention",
            )
        )
    heads = text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    sliding = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if sliding else "full_attention"] * text.num_hidden_layers
    return ModelGeometry(
        tuple(
            LayerGeometry(
                kv_heads, heads, dim, dim, sliding if kind == "sliding_attention" else None
            )
            for kind in types[: text.num_hidden_layers]
        )
    )


# -- masks ----------------------------------------------------------------------------------------


class LazyMask:
    """An attention mask that is evaluated window by window, so that [T, T] never exists for long prompts.

    It carries the arguments transformers made it with; `resolve` makes the mask of another implementation.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        mask = arguments.get("attention_mask")
        local = arguments.get("local_size")
        self.padding: torch.Tensor | None = None
        holes = mask is not None and not bool(mask.all())
        if holes:
            assert mask is not None
            seen = mask.any(-1)
            self.padding = torch.where(seen, mask.to(torch.uint8).argmax(-1), mask.shape[-1])
        end = arguments.get("q_offset", 0) + arguments["q_length"]
        self.is_causal = (
            not holes
            and bool(arguments.get("allow_is_causal_skip", False))
            and (local is None or end <= local)
        )

    def window(self, rows: slice, columns: slice) -> torch.Tensor | None:
        """See `attention.Mask`."""
        a = self.arguments
        offset = a.get("q_offset", 0)
        if self.is_causal and columns.stop <= offset + rows.start + 1:
            return None
        made = {
            **a,
            "q_length": rows.stop - rows.start,
            "kv_length": columns.stop - columns.start,
            "q_offset": offset + rows.start,
            "kv_offset": columns.start,
            "allow_is_causal_skip": False,
        }
        return sdpa_mask(**made)

    def resolve(self, implementation: str) -> Any:
        """The mask that another attention implementation expects."""
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](**self.arguments)

    def to(self, *_: Any, **__: Any) -> LazyMask:
        """Devices are settled when a window is made."""
        return self


class TensorMask:
    """A ready 4-D mask, boolean or additive, in the form of `attention.Mask`."""

    padding = None
    is_causal = False

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2

    def window(self, rows: slice, columns: slice) -> torch.Tensor | None:
        """See `attention.Mask`."""
        return self.mask[:, :, rows, columns]


def _make_mask(**arguments: Any) -> LazyMask:
    return LazyMask(arguments)


# -- hooks ----------------------------------------------------------------------------------------


@dataclass
class _Call:
    """What the hook before an attention module saw."""

    rope: CosSin | None
    source: RotarySource | None
    positions: torch.Tensor | None
    mask: Any


class _Attachment:
    """Hooks of one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.implementation: str = model.config._attn_implementation
        self.observer: Observer | None = None
        self.geometry = geometry(model.config)
        self._calls: dict[int, tuple[torch.Tensor, RotarySource, torch.Tensor]] = {}
        for module in model.modules():
            if type(module).__name__.endswith("RotaryEmbedding"):
                module.register_forward_hook(self._after_rotary, with_kwargs=True)
        for module in _attention_modules(model):
            _SEAMS[module] = _Seam(self, module)
            module.register_forward_pre_hook(self._before_attention, with_kwargs=True)

    def _after_rotary(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        named = dict(kwargs)
        positions = named.pop("position_ids", None)
        rest = args[1:]
        if positions is None and rest:
            positions, rest = rest[0], rest[1:]
        named.pop("x", None)
        if isinstance(positions, torch.Tensor) and isinstance(output, tuple):
            source = RotarySource(module, tuple(rest), tuple(sorted(named.items())))
            self._calls[hash(source)] = (output[0], source, positions)

    def _before_attention(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        cache = next(
            (kwargs[n] for n in ("past_key_values", "layer_past") if kwargs.get(n) is not None),
            None,
        )
        if not isinstance(cache, KVCache) and self.observer is None:
            return None
        seam, rope = _SEAMS[module], kwargs.get("position_embeddings")
        call = _Call(rope, None, None, kwargs.get("attention_mask"))
        if rope is not None:
            for cos, source, positions in self._calls.values():
                if cos is rope[0]:
                    call.source, call.positions = source, positions
            kwargs = {**kwargs, "position_embeddings": seam.identity(rope)}
        seam.call = call
        if isinstance(cache, KVCache):
            cache.begin(seam)
        return args, kwargs


class _Seam:
    """What is known of one attention module."""

    def __init__(self, attachment: _Attachment, module: nn.Module) -> None:
        self.attachment = attachment
        self.layer = int(module.layer_idx)  # type: ignore[arg-type]
        self.rotate: Rotate | None = rotation_function(module)
        self.uses_rope: bool | None = None
        self.call: _Call | None = None

    def identity(self, rope: CosSin) -> CosSin:
        """cos = 1 and sin = 0; the first time as probes that notice whether the module rotates at all."""
        cos, sin = (
            torch.full((1, 1, 1), x, dtype=rope[0].dtype, device=rope[0].device) for x in (1.0, 0.0)
        )
        pair = (cos.expand(rope[0].shape), sin.expand(rope[1].shape))
        if self.uses_rope is not None:
            return pair
        self.uses_rope = False
        probe = pair[0].as_subclass(_Probe)
        probe.seam = self
        return probe, pair[1]

    def turn(self, x: torch.Tensor, rope: CosSin | None) -> torch.Tensor:
        """Rotate [B, H, T, D] where this module rotates, in the dtype of x."""
        if rope is None or not self.uses_rope or self.rotate is None:
            return x
        return self.rotate(x, *rope).to(x.dtype)


class _Probe(torch.Tensor):
    """A cos that tells when it is used; operations on it give plain tensors."""

    seam: _Seam

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.__setattr__ or getattr(func, "__name__", "") in (
                "__get__",
                "__set__",
            ):
                return func(*args, **(kwargs or {}))
            for a in args:
                if isinstance(a, cls):
                    a.seam.uses_rope = True
            plain = [a.as_subclass(torch.Tensor) if isinstance(a, cls) else a for a in args]
            return func(*plain, **(kwargs or {}))


_SEAMS: weakref.WeakKeyDictionary[nn.Module, _Seam] = weakref.WeakKeyDictionary()
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, _Attachment] = weakref.WeakKeyDictionary()


def _attention_modules(model: nn.Module) -> list[nn.Module]:
    """Innermost modules that own a layer index and call the attention interface."""
    found = [
        m for m in model.modules() if hasattr(m, "layer_idx") and "Attention" in type(m).__name__
    ]
    return [m for m in found if not any(c is not m and c in found for c in m.modules())]


def attach(model: PreTrainedModel) -> None:
    """Prepare a model for our caches; calls without one behave as before. Attaching twice does nothing.

    Raises:
        ValueError: the architecture has no attention interface.
    """
    if model in _ATTACHED:
        return
    geometry(model.config)
    if not model._can_set_attn_implementation() or not _attention_modules(model):
        raise ValueError(
            explain(
                f"model ({model.config.model_type})",
                "attention",
                "of a family with the attention interface",
                "its own",
            )
        )
    _ATTACHED[model] = _Attachment(model)
    model.set_attn_implementation(NAME)


@contextlib.contextmanager
def observe_kv(model: PreTrainedModel, callback: Observer) -> Iterator[None]:
    """Show keys and values as a cache would store them, during forward passes without a cache.

    Args:
        model: any supported model.
        callback: called once per owning layer and forward pass with (layer, k [B, H, T, D] before RoPE, v
            [B, H, T, D]); the tensors are the live ones, so hooks on them see gradients.
    """
    attach(model)
    attachment = _ATTACHED[model]
    assert attachment.observer is None, "one observer at a time"
    attachment.observer = callback
    try:
        yield
    finally:
        attachment.observer = None


# -- attention ------------------------------------------------------------------------------------


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function that transformers calls; q, k, v [B, heads, T, D] -> [B, T, Hq, Dv]."""
    seam = _SEAMS.get(module)
    handle: _Handle | None = getattr(key, "kvsmith_handle", None)
    if seam is not None and handle is not None and seam.call is not None:
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        scores = Scores(scale, kwargs.get("softcap"), kwargs.get("s_aux"))
        return handle.attend(
            seam, query, key, value, _as_mask(attention_mask, handle, query), scores
        ), None
    if seam is not None and seam.attachment.observer is not None and seam.call is not None:
        seam.attachment.observer(seam.layer, key, value)
        query, key = seam.turn(query, seam.call.rope), seam.turn(key, seam.call.rope)
    implementation = seam.attachment.implementation if seam is not None else "sdpa"
    if isinstance(attention_mask, LazyMask):
        attention_mask = attention_mask.resolve(implementation)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    return function(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )


def _as_mask(mask: Any, handle: _Handle, query: torch.Tensor) -> LazyMask | TensorMask:
    if isinstance(mask, LazyMask):
        return mask
    if isinstance(mask, torch.Tensor):
        return TensorMask(mask)
    T = query.shape[2]
    return LazyMask(
        {
            "batch_size": query.shape[0],
            "q_length": T,
            "kv_length": handle.before + T,
            "q_offset": handle.before,
            "allow_is_causal_skip": True,
            "device": query.device,
        }
    )


@dataclass
class _Handle:
    """Travels on the new keys from `update` to the attention function, and to layers that share them."""

    cache: KVCache
    layer: int
    before: int

    def attend(
        self,
        seam: _Seam,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: LazyMask | TensorMask,
        scores: Scores,
    ) -> torch.Tensor:
        """Rotate and attend; see `attention.attend_store`."""
        assert seam.call is not None
        call, cache = seam.call, self.cache
        pre = cache.spec.codec.key_domain == "pre"

        def rotate(
            keys: torch.Tensor, start: int | None, columns: torch.Tensor | None
        ) -> torch.Tensor:
            if not pre or call.source is None or not seam.uses_rope:
                return keys
            stop = 0 if start is None else start + keys.shape[2]
            return seam.turn(
                keys, cache.positions.cos_sin(call.source, q.dtype, start, stop, columns)
            )

        out = attend_store(
            seam.turn(q, call.rope),
            seam.turn(k, call.rope),
            v,
            cache.stores[self.layer],
            self.before,
            mask,
            rotate,
            scores,
        )
        if seam.layer == len(cache.layers) - 1:
            cache.positions.end_pass()
        return out


# -- the cache ------------------------------------------------------------------------------------


class KVCache(Cache):
    """A compressed KV cache that `transformers` models take as `past_key_values`.

    Made by `make_cache`, or by a bundle's `cache(model)`.
    """

    def __init__(
        self, spec: CacheSpec, shape: ModelGeometry, parameters: Mapping[str, torch.Tensor]
    ) -> None:
        check_geometry(spec, shape)
        self.spec, self.geometry = spec, shape
        self.positions = Positions(spec.page_size)
        self.stores: dict[int, LayerStore] = {}
        for i in shape.owners:
            layer = shape.layers[i]
            sides = []
            for name, part, dim in (
                ("k", spec.codec.k, layer.k_dim),
                ("v", spec.codec.v, layer.v_dim),
            ):
                prefix = f"layers.{i}.{name}"
                own = {
                    n[len(prefix) + 1 :]: t
                    for n, t in parameters.items()
                    if n.startswith(prefix + ".")
                }
                sides.append(
                    Codec(part, layer.kv_heads, dim, DTYPES[spec.codec.store_dtype], own, prefix)
                )
            self.stores[i] = LayerStore(spec.codec, layer, spec.page_size, *sides)
        self._calls: dict[int, _Seam] = {}
        super().__init__(layers=[_Layer(self, i) for i in range(len(shape.layers))])

    # ... what the attention modules call

    def begin(self, seam: _Seam) -> None:
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
        """Store new tokens of a layer.

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
        store, call = self.stores[layer_idx], seam.call
        before = store.length
        if call.positions is not None and self.positions.length == before:
            if self.spec.codec.key_domain == "pre":
                self.positions.append(call.positions)
        stored = (
            key_states if self.spec.codec.key_domain == "pre" else seam.turn(key_states, call.rope)
        )
        store.append(stored, value_states, getattr(call.mask, "padding", None))
        handed = key_states.view_as(key_states)
        handed.kvsmith_handle = _Handle(self, layer_idx, before)  # type: ignore[attr-defined]
        return handed, value_states

    # ... sizes

    def nbytes(self) -> int:
        """Bytes of every allocated tensor."""
        return self.bytes().total

    def bytes(self) -> CacheBytes:
        """Allocated bytes by what they hold."""
        sums = {"body": 0, "windows": 0, "parameters": 0}
        for store in self.stores.values():
            for kind, tensor in store.tensors():
                sums[kind] += tensor.nbytes
        return CacheBytes(**sums, positions=self.positions.nbytes)

    def bits_per_element(self) -> float:
        """All-in bits per cached key or value element: 8 * nbytes over the elements of the tokens held."""
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
            tokens_to_remove: minus the number of tokens to forget, as transformers passes it; a positive number is
                the length to keep.
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
    def _store(self) -> LayerStore:
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
        ValueError: the model or its shape is not supported, or a parameter is missing.
    """
    attach(model)
    return KVCache(spec, geometry(model.config), parameters or {})


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _make_mask)
