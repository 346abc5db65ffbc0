"""What is compared: the uncompressed cache, baselines that need no calibration, and bundles."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from kvsmith.bundle import Calibration
from kvsmith.hf import make_cache
from kvsmith.spec import CacheSpec
from kvsmith.strict import to_dict


@dataclass(frozen=True)
class Candidate:
    """One way to cache.

    Attributes:
        name: word for tables.
        role: "full" is transformers' DynamicCache, the control of everything else.
        source: bundle folder or configuration file.
        spec: the cache; None for "full".
        parameters: tensors of the codec, None where it has none.
        calibration: where a bundle's parameters come from.
    """

    name: str
    role: Literal["full", "baseline", "bundle"]
    source: str
    spec: CacheSpec | None = None
    parameters: Mapping[str, Tensor] | None = None
    calibration: Calibration | None = None

    def cache(self, model: PreTrainedModel) -> Cache:
        """A new, empty cache for `model`."""
        if self.spec is None:
            return DynamicCache(config=model.config)
        return make_cache(
            model, self.spec, None if self.parameters is None else dict(self.parameters)
        )

    def identity(self) -> object:
        """Plain data that is equal for equal caches, whatever they are called."""
        return {"spec": to_dict(self.spec), "parameters": digest(self.parameters or {})}


FULL = Candidate("full precision", "full", "transformers.DynamicCache")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of `tensors`, in the order of their names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
