"""Compressed KV caches for language models.

    cache = kvsmith.load("artifacts/bundles/tiny/kvquant_nuq4_o1-0123abcd").cache(model)
    model.generate(**inputs, past_key_values=cache)

A bundle (docs/FORMAT.md) binds a `CacheSpec` and its calibrated parameters to a base model. Codecs
that need no calibration work without one: `kvsmith.make_cache(model, spec)`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsmith.bundle import Bundle, BundleError, load
from kvsmith.spec import CacheSpec, CodecSpec
from kvsmith.version import __version__

if TYPE_CHECKING:
    import torch

    from kvsmith.hf import KVCache
    from kvsmith.hf.compress import Compression
    from kvsmith.plans import Plan

__all__ = [
    "Bundle",
    "BundleError",
    "CacheSpec",
    "CodecSpec",
    "__version__",
    "compress",
    "fit",
    "load",
    "make_cache",
    "plan",
]


def make_cache(
    model: Any, spec: CacheSpec, parameters: Mapping[str, torch.Tensor] | None = None
) -> KVCache:
    """An empty cache for a model; `kvsmith.hf.make_cache`, with transformers imported only now.

    Args:
        model: a transformers model.
        spec: what the cache is.
        parameters: `layers.{i}.{k|v}.{name}` -> float32 tensor, for codecs that own some.

    Returns:
        The cache, for `generate(..., past_key_values=cache)`.

    Raises:
        ValueError: the model or its shape is not supported, or a parameter is missing.
    """
    from kvsmith.hf import make_cache as make

    return make(model, spec, parameters)


def compress(
    model: Any, bundle: Bundle | CacheSpec | str | Path
) -> AbstractContextManager[Compression]:
    """Compress the cache of everything that a model generates inside a block.

        with kvsmith.compress(model, bundle) as used:
            model.generate(**inputs)
        used.cache.nbytes()

    Args:
        model: a transformers model; unchanged after the block. Calls with `past_key_values` of
            their own keep it.
        bundle: a bundle, its folder or hub name; a cache that needs no calibration, or the name of
            a codec that needs none (`conf/codec`), such as "zero-4".

    Returns:
        A context manager; its `cache` is that of the latest call.

    Raises:
        BundleError: no bundle, or one of another model.
        ValueError: the model is not supported, or inside such a block already; or a codec that
            needs calibration.
    """
    from kvsmith.hf.compress import compress as enter

    if isinstance(bundle, str) and "/" not in bundle and not Path(bundle).is_dir():
        from kvsmith.hf import geometry
        from kvsmith.pipeline.codecs import uncalibrated

        bundle = uncalibrated(bundle, geometry(model.config), "compress")
    if isinstance(bundle, CacheSpec):
        spec = bundle
        return enter(model, lambda: make_cache(model, spec))
    found = bundle if isinstance(bundle, Bundle) else Bundle.from_pretrained(bundle)
    found.cache(model)  # refuses another model now, not at the first token
    return enter(model, lambda: found.cache(model))


def plan(
    model: Any,
    device: str,
    context: int | str,
    codecs: Sequence[str] | Mapping[str, CacheSpec] | None = None,
    *,
    batch: int = 1,
    factor: int = 1,
    devices: int = 1,
) -> Plan:
    """What fits on a device, and what a decoding step costs there at least; see `kvsmith.planner`.

    Args:
        model: a shape such as "llama3-8b" (`kvsmith.hf.shapes`), a folder, a hub name, a
            configuration or a model. Weights are not loaded.
        device: for example "h200"; `kvsmith.devices`.
        context: tokens of a row, as a number or written like "200k" or "1M".
        codecs: presets of `conf/codec` by name, or caches by names of your own; None is every
            preset.
        batch: rows.
        factor: layers that share one owner's tokens (cross-layer attention); 1 as the model is.
        devices: equal ones that layers are spread over, as `device_map="auto"` does.

    Returns:
        The plan; `plan[codec]` is one cache of it. A context beyond the model's positions is a
        warning, and a note in the plan.

    Raises:
        FileNotFoundError, ValueError: an unknown model, device or preset; lists the known.
    """
    from kvsmith.devices import device_by_name
    from kvsmith.hf.shapes import find_config, model_facts
    from kvsmith.planner import make_plan
    from kvsmith.plans import Load
    from kvsmith.units import parse_count

    where = device_by_name(device)
    load = Load(parse_count(context, "context"), batch, devices=devices)
    facts = model_facts(*find_config(model))
    if not isinstance(codecs, Mapping):
        from kvsmith.pipeline.codecs import presets

        codecs = presets(codecs)
    made = make_plan(facts, where, load, codecs, factor)
    if beyond := [note for note in made.notes if "positions" in note]:
        warnings.warn(beyond[0], stacklevel=2)
    return made


def fit(
    model: Any,
    texts: Sequence[str] | torch.Tensor,
    *,
    bits: float | None = None,
    bytes: int | str | None = None,
    context: int | str = "32Ki",
    tokenizer: Any = None,
    **options: Any,
) -> Bundle:
    """The best cache under a budget: each layer gets what its keys and values need, as measured.

    Args:
        model: a loaded causal language model.
        texts: calibration text, or [rows, T] int64 token ids; some 30,000 tokens do.
        bits: all-in bits an element at `context`; or
        bytes: of the whole cache of one row at `context`, as a number or like "20GiB".
        context: tokens, as a number or like "200k".
        tokenizer: of the model; None loads it from where the model came from.
        options: `widths`, `fractions`, `ranks`, `recents`, `trained`, ... of
            `kvsmith.pipeline.budget.BudgetOptions`.

    Returns:
        A bundle for the model; the same model and text give the same bundle.

    Raises:
        ValueError: a budget that nothing fits (names the smallest possible), or too little text.
    """
    from kvsmith.pipeline.budget.memory import fit_bundle
    from kvsmith.pipeline.budget.options import BudgetOptions

    asked = BudgetOptions(bytes=bytes, context=context, check=0, **options)
    return fit_bundle(model, texts, bits, asked, tokenizer)
