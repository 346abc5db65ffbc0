"""Weights of a model: a hash that tells them apart, and the change into those of another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kvsmith.errors import explain

SAMPLED = 1024  # elements of each weight that enter its hash
SMALLEST = 2.0**-14  # smallest normal float16


def weights_hash(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes and 1024 evenly spread elements of all weights.

    Elements are rounded to bfloat16, and to 0 below the normal range of float16, so that the hash
    is the same in whichever of float32, bfloat16 and float16 the model was loaded. The exception:
    float32 weights loaded in float16, which rounds otherwise.

    Args:
        weights: by name, in the order of their names, each once.
    """
    state = hashlib.sha256()
    for name, weight in weights:
        flat = weight.detach().flatten()
        some = flat[:: max(1, flat.numel() // SAMPLED)].bfloat16().float().cpu()
        some = some.masked_fill(some.abs() < SMALLEST, 0.0).contiguous()
        state.update(f"{name} {list(weight.shape)}\n".encode())
        state.update(some.numpy().astype("<f4").tobytes())
    return state.hexdigest()


def weights_in_memory(model: Any, where: str) -> dict[str, Tensor]:
    """The weights of a model by name, in the order of their names; tied ones once.

    Args:
        model: a transformers model.
        where: what errors name.

    Raises:
        ValueError: one of them is not in memory, or quantized.
    """
    weights = dict(sorted(model.named_parameters()))
    for name, weight in weights.items():
        if weight.is_meta or not weight.is_floating_point():
            got = "elsewhere" if weight.is_meta else str(weight.dtype)
            remedy = "Load the model whole, in float32, bfloat16 or float16."
            raise ValueError(explain(f"{where}: {name}", "weight", "in memory", got, remedy))
    return weights


@torch.no_grad()
def change_weights(
    weights: Mapping[str, Tensor], changed: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Set weights in place.

    Args:
        weights: all of a model's, by name.
        changed: what some of them become.
        dtype: that all others are rounded to.
    """
    for name, weight in weights.items():
        weight.copy_(changed.get(name, weight).to(dtype))
