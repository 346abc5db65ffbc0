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
    def log_phi(self, q: torch.Tensor, reader: int = 0) -> torch.Tensor:
        """[B, Hq, T, D] -> [B, Hq, T, R] float32.

        Args:
            q: queries after RoPE, of one of the layers that read the state, or of all of them as
                `ModelGeometry.joined` lays them out.
            reader: which one.
        """

    @abstractmethod
    def log_psi(self, k: torch.Tensor) -> torch.Tensor:
        """[B, H, T, D] -> [B, H, T, R] float32."""

    def _own(self, name: str, heads: int, reader: int) -> torch.Tensor:
        """`phi.name` of one reader, which has `heads` query heads."""
        whole = self.tensors[f"phi.{name}"]
        if whole.shape[0] == heads:
            return whole
        kv_heads = next(t for n, t in self.tensors.items() if n.startswith("psi.")).shape[0]
        parts = whole.unflatten(0, (kv_heads, whole.shape[0] // heads, -1))
        return parts[:, reader].flatten(0, 1)


class ExponentialMap(FeatureMap):
    """See `spec.Exponential`."""

    def log_phi(self, q: torch.Tensor, reader: int = 0) -> torch.Tensor:
        """See `FeatureMap`."""
        weight, bias = (self._own(name, q.shape[1], reader) for name in ("weight", "bias"))
        return _affine(q, weight, bias)

    def log_psi(self, k: torch.Tensor) -> torch.Tensor:
        """See `FeatureMap`."""
        return _affine(k, self.tensors["psi.weight"], self.tensors["psi.bias"])


class MLPMap(FeatureMap):
    """See `spec.MLP`; no biases, dropout left to training."""

    def log_phi(self, q: torch.Tensor, reader: int = 0) -> torch.Tensor:
        """See `FeatureMap`."""
        first, second = (self._own(name, q.shape[1], reader) for name in ("first", "second"))
        return _log(_two_layers(q, first, second).abs())

    def log_psi(self, k: torch.Tensor) -> torch.Tensor:
        """See `FeatureMap`."""
        t = self.tensors
        a = t["psi.s1"].abs()[:, None] * _two_layers(k, t["psi.first"], t["psi.second"])
        return _log((a + a @ t["psi.third"] * t["psi.s2"][:, None]).abs())


def feature_map(features: Features, tensors: Mapping[str, torch.Tensor]) -> FeatureMap:
    """The map that a spec names, with its trained tensors."""
    return ExponentialMap(tensors) if isinstance(features, Exponential) else MLPMap(tensors)


def _affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.float() @ (weight * weight.shape[1] ** -0.5) + bias[:, None]


def _two_layers(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return F.gelu(F.gelu(x.float() @ first) @ second)


def _log(x: torch.Tensor) -> torch.Tensor:
    return torch.log(x.clamp(min=FLOOR))
