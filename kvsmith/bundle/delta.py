"""The delta of a bundle: what its model's weights are beside those of the model it was made from.

A weight is the delta's, or else the base's, rounded to the delta's dtype.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from kvsmith.bundle.errors import refuse
from kvsmith.errors import explain
from kvsmith.layout import DTYPES

DELTA_SHARD = "delta.safetensors"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Delta:
    """From which model, and where what differs is.

    Attributes:
        id: hub name, or the word that the exporter's configuration gave it.
        revision: commit of a hub model, None for a local one.
        weights_hash: of its weights, `kvsmith.hf.weights.weights_hash`.
        dtype: of the weights that this makes.
        files: shards that hold weights; none where only the sharing differs.
    """

    id: str
    revision: str | None
    weights_hash: str
    dtype: Literal["float16", "bfloat16", "float32"]
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError(explain("delta.id", "name", "non-empty", "nothing"))
        if not _SHA256.fullmatch(self.weights_hash):
            expected = "64 hexadecimal digits"
            raise ValueError(explain("delta.weights_hash", "hash", expected, self.weights_hash))
        if len(set(self.files)) != len(self.files):
            raise ValueError(explain("delta.files", "names", "different", list(self.files)))


def check_weights(delta: Delta | None, weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse weights that no model has.

    Raises:
        BundleError: weights without a delta, of another dtype, or not finite.
    """
    if delta is None:
        if weights:
            raise refuse(where, "weights", "none without a delta", len(weights))
        return
    for name, weight in weights.items():
        if weight.dtype != DTYPES[delta.dtype]:
            raise refuse(f"{where}: {name}", "dtype", delta.dtype, weight.dtype)
        if not bool(torch.isfinite(weight).all()):
            raise refuse(f"{where}: {name}", "weight", "finite", "NaN or infinity")
