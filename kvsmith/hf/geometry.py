"""The shape of a transformers model, from its configuration alone."""

from __future__ import annotations

from typing import Any

from kvsmith.cla import check_owner
from kvsmith.errors import explain
from kvsmith.geometry import LayerGeometry, ModelGeometry


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
    sliding = getattr(text, "sliding_window", None)
    count = text.num_hidden_layers
    types = getattr(text, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if sliding else "full_attention"] * count
    # Heterogeneous configurations (Gemma 4) hold one configuration a layer.
    parts = list(getattr(text, "per_layer_config", None) or [text] * count)
    layers = tuple(
        _layer_geometry(part, sliding if kind == "sliding_attention" else None)
        for part, kind in zip(parts, types[:count], strict=True)
    )
    native = _owners(types[:count], getattr(text, "num_kv_shared_layers", 0) or 0)
    owner = getattr(text, "kv_owner", None)
    if owner is None:
        return ModelGeometry(layers, native)
    _check_shared(owner, layers, native, where)
    return ModelGeometry(layers, tuple(owner))


def _check_shared(
    owner: Any, layers: tuple[LayerGeometry, ...], native: tuple[int, ...], where: str
) -> None:
    """Refuse a `kv_owner` that the architecture cannot follow."""
    if not isinstance(owner, (list, tuple)):
        raise ValueError(explain(where, "kv_owner", "a list of layers", repr(owner)))
    check_owner(owner, len(layers), f"{where}.kv_owner")
    if native != tuple(range(len(layers))):
        raise ValueError(explain(where, "kv_owner", "absent: layers share already", list(owner)))
    for layer, own in enumerate(owner):
        if layers[layer] != layers[own]:
            what = f"layer {layer}, which reads layer {own}"
            raise ValueError(explain(where, what, str(layers[own]), layers[layer]))


def _layer_geometry(config: Any, window: int | None) -> LayerGeometry:
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if config.model_type == "falcon":
        grouped = config.new_decoder_architecture or not config.multi_query
        kv_heads = config.num_kv_heads if grouped else 1
    return LayerGeometry(kv_heads, heads, dim, dim, window)


def _owners(types: list[str], shared: int) -> tuple[int, ...]:
    """The last `shared` layers read the last earlier layer of their type (Gemma 3n, Gemma 4)."""
    first = len(types) - shared
    last = {kind: i for i, kind in enumerate(types[:first])}
    return tuple(i if i < first else last[kind] for i, kind in enumerate(types))
