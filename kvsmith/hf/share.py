"""Make layers of a stock model read the keys and values of earlier layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from kvsmith.errors import explain
from kvsmith.hf.dense import ObservingCache
from kvsmith.hf.geometry import geometry
from kvsmith.hf.seam import ATTACHED, SeamCache, attach


def share(model: PreTrainedModel, owner: Sequence[int] | None = None) -> None:
    """Let layers share, in passes with and without a cache, with gradients or not.

    What a reading layer projects itself is dropped. The map is written into the configuration as
    `kv_owner`, where `save_pretrained` keeps it.

    Args:
        model: a transformers model; changed in place.
        owner: for each layer the layer whose tokens it reads, itself in all for a model as it was
            made; None takes the map that the configuration already holds, if any.

    Raises:
        ValueError: the map does not fit the model.
    """
    config = model.config.get_text_config(decoder=True)
    before = getattr(config, "kv_owner", None)
    if owner is None and before is None:
        return
    if owner is not None:
        apart = list(owner) == list(range(len(owner)))
        config.kv_owner = None if apart else [int(o) for o in owner]
    try:
        shape = geometry(model.config)
    except ValueError:
        config.kv_owner = before
        raise
    attach(model)
    attachment = ATTACHED[model]
    attachment.geometry = shape
    if not attachment.deferred and not attachment.guarded:
        attachment.guarded = True
        model.register_forward_pre_hook(_shared_without_interface, with_kwargs=True)


def _shared_without_interface(model: Any, args: Any, kwargs: Any) -> Any:
    """Modules that attend by themselves share through a cache, which keeps nothing."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, SeamCache) or not ATTACHED[model].shared:
        return args, kwargs
    if cache is not None:
        where, remedy = f"model ({model.config.model_type})", "Make one with kvsmith.make_cache."
        expected = "one of kvsmith's, since its layers share"
        raise ValueError(explain(where, "past_key_values", expected, type(cache).__name__, remedy))
    shape = ATTACHED[model].geometry
    cache = ObservingCache(lambda *_: None, [layer.kv_heads for layer in shape.layers], shape.owner)
    return args, {**kwargs, "past_key_values": cache, "use_cache": True}
