"""Watch keys and values as a cache would store them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedModel

from kvsmith.hf.dense import ObservingCache
from kvsmith.hf.seam import ATTACHED, Attachment, Observer, attach


@contextlib.contextmanager
def observe_kv(model: PreTrainedModel, callback: Observer) -> Iterator[None]:
    """Show keys and values as a cache would store them, during forward passes without a cache.

    Args:
        model: any supported model.
        callback: called once per owning layer and forward pass with (layer, k [B, H, T, D] before
            RoPE, v [B, H, T, D]); the tensors are the live ones, so hooks on them see gradients.
    """
    attach(model)
    attachment = ATTACHED[model]
    assert attachment.observer is None, "one observer at a time"
    attachment.observer = callback
    hook = None
    if not attachment.deferred:
        hook = model.register_forward_pre_hook(_observing(attachment, callback), with_kwargs=True)
    try:
        yield
    finally:
        attachment.observer = None
        if hook is not None:
            hook.remove()


def _observing(attachment: Attachment, callback: Observer) -> Callable[..., Any]:
    """A hook that gives each forward pass of the model an observing cache."""
    heads = [layer.kv_heads for layer in attachment.geometry.layers]

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        cache = ObservingCache(callback, heads, attachment.geometry.owner)
        return args, {**kwargs, "past_key_values": cache, "use_cache": True}

    return before
