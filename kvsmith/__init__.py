"""Compressed KV caches for language models.

    cache = kvsmith.load("artifacts/bundles/tiny/kvquant_nuq4_o1-0123abcd").cache(model)
    model.generate(**inputs, past_key_values=cache)

A bundle (docs/FORMAT.md) binds a `CacheSpec` and its calibrated parameters to a base model. Codecs
that need no calibration work without one: `kvsmith.make_cache(model, spec)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvsmith.bundle import Bundle, BundleError, load
from kvsmith.spec import CacheSpec, CodecSpec
from kvsmith.version import __version__

if TYPE_CHECKING:
    import torch

    from kvsmith.hf import KVCache

__all__ = [
    "Bundle",
    "BundleError",
    "CacheSpec",
    "CodecSpec",
    "__version__",
    "load",
    "make_cache",
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
