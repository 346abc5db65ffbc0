"""Feature maps: log phi(q) of queries and log psi(k) of keys, both after RoPE.

The state needs logarithms alone (see `state.py`), so exponential features never leave log space
and cannot overflow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from kvsmith.less.spec import Exponential, Features

# Features below this count as this: log needs a floor, and the paper's code uses it.
FLOOR = 1e-6


class FeatureMap(ABC):
    """Queries and keys to logarithms of positive features.

    Args:
        tensors: as `less_tensors` names them.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)

    def to(self, device: torch.device) -> None:
        """Move the tensors to a device."""
        self.tensors = {name: t.to(device) for name, t in self.tensors.items()}

    @abstractmethod
    def log_phi(
        self,
        q: torch.Tensor,
    ) -> torch.Tensor:
        """[B, Hq, T, D] -> [B, Hq, T, R] float32."""

    @abstractmethod
    def log_psi(
        self,
        k: torch.Tensor,
    ) -> torch.Tensor:
        """[B, H, T, D] -> [B, H, T, R] float32."""


class ExponentialMap(FeatureMap):
    """See `spec.Exponential`."""

    def log_phi(self, q: torch.Tensor) -> torch.Tensor:
        """See `FeatureMap`."""
        return self._logits(q, "phi")

    def log_psi(self, k: torch.Tensor) -> torch.Tensor:
        """See `FeatureMap`."""
        return self._logits(k, "psi")

    def _logits(self, x: torch.Tensor, side: str) -> torch.Tensor:
        weight, bias = self.tensors[f"{side}.weight"], self.tensors[f"{side}.bias"]
        return x.float() @ (weight * weight.shape[1] ** -0.5) + bias[:, None]


class MLPMap(FeatureMap):
    """See `spec.MLP`; no biases, dropout left to training."""

    def log_phi(self, q: torch.Tensor) -> torch.Tensor:
        """See `FeatureMap`."""
        return _log(self._layers(q, "phi").abs())

    def log_psi(self, k: torch.Tensor) -> torch.Tensor:
        """See `FeatureMap`."""
        t = self.tensors
        a = t["psi.s1"].abs()[:, None] * self._layers(k, "psi")
        return _log((a + a @ t["psi.third"] * t["psi.s2"][:, None]).abs())

    def _layers(self, x: torch.Tensor, side: str) -> torch.Tensor:
        hidden = F.gelu(x.float() @ self.tensors[f"{side}.first"])
        return F.gelu(hidden @ self.tensors[f"{side}.second"])


def feature_map(features: Features, tensors: Mapping[str, torch.Tensor]) -> FeatureMap:
    """The map that a spec names, with its trained tensors."""
    return ExponentialMap(tensors) if isinstance(features, Exponential) else MLPMap(tensors)


def _log(x: torch.Tensor) -> torch.Tensor:
    return torch.log(x.clamp(min=FLOOR))
