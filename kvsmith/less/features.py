"""Feature maps: log phi(q) of queries and log psi(k) of keys, both after RoPE.

The state needs logarithms alone (see `state.py`), so exponential features never leave log space
and cannot overflow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F

from kvsmith.less.spec import Exponential, Features

# Features below this count as this: log needs a floor, and the paper's code uses it.
FLOOR = 1e-6

Tensors = Mapping[str, torch.Tensor]


class FeatureMap(Protocol):
    """Queries and keys to logarithms of positive features."""

    def log_phi(self, q: torch.Tensor, /) -> torch.Tensor:
        """[B, Hq, T, D] -> [B, Hq, T, R] float32."""

    def log_psi(self, k: torch.Tensor, /) -> torch.Tensor:
        """[B, H, T, D] -> [B, H, T, R] float32."""


class ExponentialMap:
    """See `spec.Exponential`.

    Args:
        tensors: as `less_tensors` names them.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._t = tensors

    def log_phi(self, q: torch.Tensor) -> torch.Tensor:
        """See `FeatureMap`."""
        return self._logits(q, "phi")

    def log_psi(self, k: torch.Tensor) -> torch.Tensor:
        """See `FeatureMap`."""
        return self._logits(k, "psi")

    def _logits(self, x: torch.Tensor, side: str) -> torch.Tensor:
        weight, bias = self._t[f"{side}.weight"], self._t[f"{side}.bias"]
        return x.float() @ (weight * weight.shape[1] ** -0.5) + bias[:, None]


class MLPMap:
    """See `spec.MLP`; no biases, dropout left to training.

    Args:
        tensors: as `less_tensors` names them.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._t = tensors

    def log_phi(self, q: torch.Tensor) -> torch.Tensor:
        """See `FeatureMap`."""
        return _log(self._layers(q, "phi").abs())

    def log_psi(self, k: torch.Tensor) -> torch.Tensor:
        """See `FeatureMap`."""
        t = self._t
        a = t["psi.s1"].abs()[:, None] * self._layers(k, "psi")
        return _log((a + a @ t["psi.third"] * t["psi.s2"][:, None]).abs())

    def _layers(self, x: torch.Tensor, side: str) -> torch.Tensor:
        hidden = F.gelu(x.float() @ self._t[f"{side}.first"])
        return F.gelu(hidden @ self._t[f"{side}.second"])


def feature_map(features: Features, tensors: Tensors) -> FeatureMap:
    """The map that a spec names, with its trained tensors."""
    return ExponentialMap(tensors) if isinstance(features, Exponential) else MLPMap(tensors)


def _log(x: torch.Tensor) -> torch.Tensor:
    return torch.log(x.clamp(min=FLOOR))
