"""Hooks and the attention function: where a transformers model meets our caches.

Deferred RoPE. A hook before each attention module keeps the position embeddings and passes identity
ones (cos = 1, sin = 0) while one of our caches is in use. Queries and keys so leave the projection
exact and unrotated, `update` stores keys before RoPE and hands them on with a handle to their
layer, and the attention function registered here rotates the query and the decoded keys with the
model's own rotary function. Calls without our cache go to the attention implementation the model
had, unchanged.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvsmith.attention import Mask, Scores
from kvsmith.errors import explain
from kvsmith.hf.geometry import geometry
from kvsmith.hf.masks import LazyMask, TensorMask, make_mask
from kvsmith.pairing import Pairing, find_pairing
from kvsmith.rope import (
    CosSin,
    Frequencies,
    RotarySource,
    Rotate,
    TableSource,
    changes_frequencies,
    frequencies,
    rotation_function,
)

NAME = "kvsmith"
# Attribute of the new keys that carries the handle, also to layers that share them.
HANDLE = "kvsmith_handle"
Observer = Callable[[int, torch.Tensor, torch.Tensor], None]


class SeamCache:
    """A cache that wants to know what the hook of each attention module saw."""

    def begin(self, seam: Seam) -> None:
        """Called before the attention module runs; `update` of that layer follows."""
        raise AssertionError("a subclass answers")

    def reset(self) -> None:
        """Forget every token."""
        raise AssertionError("a subclass answers")


class Handle(Protocol):
    """Travels on the new keys from `update` to the attention function."""

    @property
    def before(self) -> int:
        """Columns stored before the new tokens."""

    def attend(
        self,
        seam: Seam,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Mask,
        scores: Scores,
    ) -> torch.Tensor:
        """[B, T, Hq, Dv] attention of the queries over stored and new tokens."""


@dataclass
class Call:
    """What the hook before an attention module saw."""

    rope: CosSin | None
    source: RotarySource | TableSource | None
    positions: torch.Tensor | None
    mask: Any


class Attachment:
    """Hooks of one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config
        self.implementation: str = model.config._attn_implementation
        # Without the attention interface a module rotates and attends by itself (`hf.dense`).
        self.deferred = bool(model._can_set_attn_implementation())
        self.observer: Observer | None = None
        self.guarded = False  # passes without our cache share by a hook of `hf.share`
        self.geometry = geometry(model.config)
        # Keys and values of owners on their way to readers, in a pass without one of our caches.
        self._handed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._calls: dict[int, tuple[torch.Tensor, RotarySource, torch.Tensor]] = {}
        self._changing: list[nn.Module] = []
        for module in model.modules():
            if type(module).__name__.endswith("RotaryEmbedding"):
                module.register_forward_hook(self._after_rotary, with_kwargs=True)
                self._changing += [module] if changes_frequencies(module) else []
        for module in attention_modules(model):
            SEAMS[module] = Seam(self, module)
            module.register_forward_pre_hook(self._before_attention, with_kwargs=True)

    def frequencies(self) -> Frequencies:
        """What the rotary modules rotate with now, of those where that changes."""
        return frequencies(self._changing)

    @property
    def shared(self) -> bool:
        """Whether layers share by `config.kv_owner`, which the model's own code does not know."""
        config = self.config.get_text_config(decoder=True)
        return getattr(config, "kv_owner", None) is not None

    def hand(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The owner's keys and values for a layer.

        With gradients they stay until the next pass: a layer that is computed again in the backward
        pass asks again.
        """
        owner = self.geometry.owner[layer]
        if owner == layer:
            self._handed[layer] = k, v
            return k, v
        last = owner not in self.geometry.owner[layer + 1 :]
        if last and not torch.is_grad_enabled():
            return self._handed.pop(owner)
        return self._handed[owner]

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
        if not isinstance(cache, SeamCache) and self.observer is None:
            return None
        seam, rope = SEAMS[module], kwargs.get("position_embeddings")
        call = Call(rope, None, None, kwargs.get("attention_mask"))
        if rope is not None:
            call.source, call.positions = self._origin(seam, rope[0])
            kwargs = {**kwargs, "position_embeddings": seam.offer(rope)}
        elif seam.table is not None:
            ids = kwargs["position_ids"]
            call.source, call.positions = seam.table, ids
            call.rope = seam.table(ids, kwargs["hidden_states"].dtype)
        seam.call = call
        if isinstance(cache, SeamCache):
            cache.begin(seam)
        return args, kwargs

    def _origin(
        self, seam: Seam, cos: torch.Tensor
    ) -> tuple[RotarySource | None, torch.Tensor | None]:
        """The rotary module's call that made `cos`, and its position ids.

        Where layers lie on several devices a layer gets a copy, known by its values the first time
        that they tell.
        """
        for made, source, positions in self._calls.values():
            if _same_memory(made, cos):
                return source, positions
        if seam.origin is None:
            same = [
                key
                for key, (made, *_) in self._calls.items()
                if made.shape == cos.shape and torch.equal(made.to(cos.device), cos)
            ]
            if not same:
                return None, None
            seam.origin = same[0] if len(same) == 1 else None
            return self._calls[same[0]][1:]
        return self._calls[seam.origin][1:]


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class Seam:
    """What is known of one attention module."""

    def __init__(self, attachment: Attachment, module: nn.Module) -> None:
        self.attachment = attachment
        self.deferred = attachment.deferred
        # GPT-J and CodeGen rotate with a table of their own, by position ids.
        self.table = TableSource(module) if hasattr(module, "embed_positions") else None
        self.layer = int(module.layer_idx)  # type: ignore[arg-type]
        self.rotate: Rotate | None = rotation_function(module)
        self.uses_rope: bool | None = None if self.table is None else True
        self.call: Call | None = None
        self.origin: int | None = None  # of position embeddings that come as copies

    def offer(self, rope: CosSin) -> CosSin:
        """What the module gets as position embeddings: cos = 1 and sin = 0 where RoPE is deferred.

        The first cos is a probe that notices whether the module rotates at all.
        """
        cos, sin = rope
        if self.deferred:
            one = torch.ones((1, 1, 1), dtype=cos.dtype, device=cos.device)
            cos, sin = one.expand(cos.shape), torch.zeros_like(one).expand(sin.shape)
        if self.uses_rope is None:
            self.uses_rope = False
            cos = cos.as_subclass(_Probe)
            cos.seam = self
        return cos, sin

    def turn(self, x: torch.Tensor, rope: CosSin | None) -> torch.Tensor:
        """Rotate [B, H, T, D] where this module rotates, in the dtype of x."""
        if rope is None or not self.uses_rope or self.rotate is None:
            return x
        return self.rotate(x, *rope).to(x.dtype)

    def pairing(self, k: torch.Tensor) -> Pairing | None:
        """Which channels of keys [B, H, T, D] this module turns together; None where it turns none,
        or that cannot be told.
        """
        rope = None if self.call is None else self.call.rope
        if rope is None or self.rotate is None or not self.uses_rope:
            return None
        return find_pairing(self.rotate, k.shape[-1], rope[0].shape[-1], k.device)


class _Probe(torch.Tensor):
    """A cos that tells when it is used; operations on it give plain tensors."""

    seam: Seam

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


SEAMS: weakref.WeakKeyDictionary[nn.Module, Seam] = weakref.WeakKeyDictionary()
ATTACHED: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Innermost modules that own a layer index and call the attention interface."""
    found = [
        m for m in model.modules() if hasattr(m, "layer_idx") and "Attention" in type(m).__name__
    ]
    return [m for m in found if not any(c is not m and c in found for c in m.modules())]


def attach(model: PreTrainedModel) -> None:
    """Prepare a model for our caches; calls without one behave as before. Attaching twice does
    nothing.

    Raises:
        ValueError: the architecture is not supported.
    """
    if model in ATTACHED:
        return
    geometry(model.config)
    if not attention_modules(model):
        where = f"model ({model.config.model_type})"
        raise ValueError(explain(where, "attention", "in modules that know their layer", "none"))
    ATTACHED[model] = attachment = Attachment(model)
    if attachment.deferred:
        model.set_attn_implementation(NAME)
    if hasattr(model.config, "original_max_position_embeddings"):
        _keep_cache(model)


def _keep_cache(model: PreTrainedModel) -> None:
    """Where a LongRoPE model drops its cache to read the text again with other frequencies (Phi-3
    in `generate`, once, at the switch), it reads it again into the same cache.
    """
    model.prepare_inputs_for_generation = MethodType(_prepared, model)


def _prepared(model: Any, input_ids: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
    own = type(model).prepare_inputs_for_generation
    inputs = own(model, input_ids, past_key_values=past_key_values, **kwargs)
    if isinstance(past_key_values, SeamCache) and inputs.get("past_key_values") is None:
        past_key_values.reset()
        inputs["past_key_values"] = past_key_values
    return inputs


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
    """What transformers calls; q, k, v [B, heads, T, D] -> [B, T, Hq, Dv]."""
    seam = SEAMS.get(module)
    handle: Handle | None = getattr(key, HANDLE, None)
    if seam is not None and handle is not None and seam.call is not None:
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        scores = Scores(scale, kwargs.get("softcap"), kwargs.get("s_aux"))
        return handle.attend(
            seam, query, key, value, _as_mask(attention_mask, handle, query), scores
        ), None
    if seam is not None and seam.attachment.shared:
        key, value = seam.attachment.hand(seam.layer, key, value)
    if seam is not None and seam.attachment.observer is not None and seam.call is not None:
        if seam.attachment.geometry.owner[seam.layer] == seam.layer:
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


def _as_mask(mask: Any, handle: Handle, query: torch.Tensor) -> LazyMask | TensorMask:
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


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, make_mask)
