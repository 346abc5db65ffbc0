"""A histogram of values normalised to the range of their own token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvsmith.errors import explain
from kvsmith.kernels.decode.reference import expand_range
from kvsmith.kernels.encode_pack.reference import online_range
from kvsmith.kernels.format import Format
from kvsmith.pipeline.statistics.base import Statistic, scalar, take

STEPS = 8192


class TokenHistogram(Statistic):
    """Counts and sums of Fisher information over [-1, 1], of all channels and tokens together.

    Values are normalised exactly as the cache does it: outliers are left out, smallest and largest
    of the rest are -1 and 1. The 8193 points `-1 + i / 4096` hold what lies nearest to them, so
    the many values at the ends fall on a point. `fisher_scale` sums Fisher information times the
    squared half width of the range, the weight of an error in normalised units.

    Args:
        slots: outliers a token, N.
        group: channels of a head that share a range; 0 for the whole token.
        fisher: also sum Fisher information.
        device: where to work.
    """

    def __init__(
        self, slots: int, group: int = 0, fisher: bool = True, device: torch.device | str = "cpu"
    ) -> None:
        # bits and store do not enter the choice of outliers and range; in blocks of one token
        # outliers count head * D + channel
        self.format = Format(
            8, "token", group, slots, "extremes" if slots else "none", torch.float32, block=1
        )
        self.count = torch.zeros(STEPS + 1, dtype=torch.float64, device=device)
        self.fisher = torch.zeros_like(self.count) if fisher else None
        self.fisher_scale = torch.zeros_like(self.count) if fisher else None
        self.seen = 0

    @staticmethod
    def points() -> Tensor:
        """The points, [8193] float64."""
        return torch.arange(STEPS + 1, dtype=torch.float64) / (STEPS / 2) - 1

    def update(self, values: Tensor, fisher: Tensor | None = None) -> None:
        assert (fisher is None) == (self.fisher is None)
        x = values.transpose(0, 1)[None]  # [1, H, N, D]
        low, high, index = online_range(x, self.format)
        scale = expand_range((high - low) / 2, x.shape, self.format)
        zero = expand_range((high + low) / 2, x.shape, self.format)
        normal = ((x - zero) / scale).masked_fill(scale == 0, 0.0)
        point = ((normal + 1) * (STEPS / 2)).round_().clamp_(0, STEPS).to(torch.int32)
        point = point[0].transpose(0, 1).flatten(1)  # [N, H * D]
        if index is not None:
            point = point.scatter(1, index[0], STEPS + 1)  # one more slot, dropped below
        self.count += _sums(point, None)
        self.seen += len(values)
        if fisher is not None and self.fisher is not None and self.fisher_scale is not None:
            weights = fisher.flatten(1).double()
            width = scale.expand_as(x)[0].transpose(0, 1).flatten(1)
            self.fisher += _sums(point, weights)
            self.fisher_scale += _sums(point, weights * width.double() ** 2)

    def merge(self, other: TokenHistogram) -> None:
        if self.format != other.format or (self.fisher is None) != (other.fisher is None):
            raise ValueError(
                explain(
                    "statistics",
                    "parts",
                    "of the same outliers, groups and weights",
                    "different ones",
                )
            )
        self.count += other.count
        self.seen += other.seen
        for mine, theirs in ((self.fisher, other.fisher), (self.fisher_scale, other.fisher_scale)):
            if mine is not None and theirs is not None:
                mine += theirs

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"count": self.count, "fisher": self.fisher, "fisher_scale": self.fisher_scale}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in self._tensors().items()} | {
            "seen": scalar(self.seen)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self._tensors().items():
            tensor.copy_(take(state, name, tensor))
        self.seen = int(take(state, "seen", scalar(0)))


def _sums(point: Tensor, weights: Tensor | None) -> Tensor:
    flat = None if weights is None else weights.flatten()
    return torch.bincount(point.flatten(), weights=flat, minlength=STEPS + 2)[: STEPS + 1].double()
