"""Models by their configuration alone: known shapes, weights counted without memory for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from kvsmith.errors import explain
from kvsmith.geometry import ModelGeometry
from kvsmith.hf.geometry import geometry
from kvsmith.plans import ModelFacts

_LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192}
_LLAMA3_8B = {**_LLAMA3, "hidden_size": 4096, "intermediate_size": 14336}
# Published shapes: name -> (configuration class, what differs from its defaults).
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2-7b": ("LlamaConfig", {"max_position_embeddings": 4096}),
    "llama2-13b": (
        "LlamaConfig",
        {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "max_position_embeddings": 4096,
        },
    ),
    "llama3-8b": ("LlamaConfig", _LLAMA3_8B),
    "llama3.1-8b": ("LlamaConfig", {**_LLAMA3_8B, "max_position_embeddings": 131072}),
    "llama3-70b": (
        "LlamaConfig",
        {
            **_LLAMA3,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
        },
    ),
    "mistral-7b": ("MistralConfig", {"max_position_embeddings": 32768}),  # v0.1, which slides
    "qwen2.5-7b": (
        "Qwen2Config",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
        },
    ),
    "qwen3-8b": (
        "Qwen3Config",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "max_position_embeddings": 40960,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 512,
            "max_position_embeddings": 32768,
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": 2047}),
    "falcon-7b": ("FalconConfig", {}),
    "pythia-160m": (
        "GPTNeoXConfig",
        {
            "vocab_size": 50304,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
    ),
}


def shape_config(name: str) -> Any:
    """The configuration of a shape of `SHAPES`."""
    kind, options = SHAPES[name]
    return getattr(transformers, kind)(**options)


def find_config(model: Any) -> tuple[str, Any]:
    """Name and configuration of a model, however it is given.

    Args:
        model: a name of `SHAPES`, a folder with config.json, a hub name, a configuration, or a
            model.

    Raises:
        FileNotFoundError: no such shape and no such folder; lists the shapes.
        ValueError: a configuration that transformers refuses.
    """
    if not isinstance(model, (str, Path)):
        config = getattr(model, "config", model)
        return str(config.model_type), config
    name = str(model)
    if name in SHAPES:
        return name, shape_config(name)
    if not Path(name).is_dir() and name.count("/") != 1:
        expected = f"a folder, a hub name or one of {', '.join(SHAPES)}"
        raise FileNotFoundError(explain("model", "value", expected, repr(name)))
    try:
        return Path(name).name, AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(explain("model", "configuration", "loadable", reason)) from error


def model_facts(name: str, config: Any) -> ModelFacts:
    """Read off a configuration what a plan needs.

    Args:
        name: word for tables.
        config: a transformers configuration.

    Raises:
        ValueError: the architecture is not supported, see `geometry`.
    """
    text = config.get_text_config(decoder=True)
    shape, fixed = _growing(geometry(config), text)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text)
    weights = sum(p.numel() for p in model.parameters())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or bool(text.tie_word_embeddings) or head.weight is embedding.weight
    return ModelFacts(
        name=name,
        geometry=shape,
        rope=uses_rope(text),
        weights=weights,
        read=weights if tied else weights - embedding.weight.numel(),
        hidden=embedding.weight.shape[1],
        inner=_inner(text, embedding.weight.shape[1]),
        vocab=text.vocab_size,
        positions=positions_of(text),
        fixed=fixed,
    )


def uses_rope(text: Any) -> bool:
    """Whether a (text) configuration rotates keys by position."""
    rotary = getattr(text, "rope_parameters", None) or getattr(text, "rotary_dim", None)
    return bool(rotary)


def positions_of(text: Any) -> int | None:
    """Positions that a (text) configuration was made for; None where it knows none (ALiBi)."""
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    return limit if isinstance(limit, int) and not getattr(text, "alibi", False) else None


def _inner(text: Any, hidden: int) -> int:
    names = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
    found = next((v for v in (getattr(text, n, None) for n in names) if v), 4 * hidden)
    return max(found) if isinstance(found, (list, tuple)) else int(found)


def _growing(shape: ModelGeometry, text: Any) -> tuple[ModelGeometry, int]:
    """The layers whose tokens are kept, and how many others there are."""
    types = getattr(text, "layer_types", None) or ["full_attention"] * len(shape.layers)
    kept = [i for i, kind in enumerate(types[: len(shape.layers)]) if _grows(kind)]
    place = {i: n for n, i in enumerate(kept)}
    layers = tuple(shape.layers[i] for i in kept)
    owner = tuple(place[shape.owner[i]] for i in kept)
    return ModelGeometry(layers, owner), len(shape.layers) - len(kept)


def _grows(kind: str) -> bool:
    return "attention" in kind and "linear" not in kind
