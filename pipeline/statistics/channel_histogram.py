"""A histogram of every channel on a grid that grows with the data."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor

from kvsmith.errors import explain
from kvsmith.pipeline.statistics.base import Statistic, take

BINS = 1024
# A float32 has 24 significant bits: a finer grid than 2^-24 of the largest value tells nothing
# apart.
FINEST = -24
LOWEST_EXPONENT = -100  # keeps 2^-e within float32


class ChannelHistogram(Statistic):
    """Counts and sums of Fisher information in 1024 bins a channel, nothing clipped.

    The bins of a channel are `[j 2^e, (j + 1) 2^e)` for integers j, with the smallest e by which
    the channel's range so far fits into 1024 bins. A wider range doubles the bins by adding them
    in pairs. Bin j sits in slot `j mod 1024`, so the state depends on the values seen and not on
    their order, and histograms merge slot by slot. At least 512 bins cover the range from smallest
    to largest value.

    It takes 8 KiB a channel: 1 GiB for the keys of a model of 32 layers with 4096 channels (4 KiB
    without Fisher information). Counts are exact up to 2^24 tokens in a bin.

    Args:
        channels: number of channels C = H * D.
        fisher: also sum Fisher information.
        device: where to work.
    """

    def __init__(
        self, channels: int, fisher: bool = True, device: torch.device | str = "cpu"
    ) -> None:
        self.count = torch.zeros(channels, BINS, device=device)
        self.fisher = torch.zeros(channels, BINS, device=device) if fisher else None
        self.exponent = torch.full((channels,), LOWEST_EXPONENT, dtype=torch.int32, device=device)
        self.minimum = torch.full((channels,), float("inf"), device=device)
        self.maximum = torch.full((channels,), -float("inf"), device=device)

    def update(self, values: Tensor, fisher: Tensor | None = None) -> None:
        assert (fisher is None) == (self.fisher is None)
        values = values.flatten(1)
        self._cover(*torch.aminmax(values, dim=0))
        slots = _bin(values, self.exponent).bitwise_and_(BINS - 1)
        slots += torch.arange(values.shape[1], dtype=torch.int32, device=values.device) * BINS
        flat = slots.flatten()
        self.count += torch.bincount(flat, minlength=self.count.numel()).view_as(self.count)
        if self.fisher is not None and fisher is not None:
            sums = torch.bincount(flat, weights=fisher.flatten(), minlength=self.count.numel())
            self.fisher += sums.view_as(self.fisher)

    def merge(self, other: ChannelHistogram) -> None:
        if (self.fisher is None) != (other.fisher is None):
            raise ValueError(
                explain("statistics", "Fisher information", "in both parts or in neither", "in one")
            )
        same = deepcopy(other)
        self._cover(other.minimum, other.maximum)
        same._cover(self.minimum, self.maximum)
        self.count += same.count
        if self.fisher is not None and same.fisher is not None:
            self.fisher += same.fisher

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in vars(self).items() if tensor is not None}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in vars(self).items():
            if tensor is not None:
                setattr(self, name, take(state, name, tensor))

    def bins(self) -> tuple[Tensor, Tensor]:
        """Where the slots lie.

        Returns:
            (lower, width): lower end of every bin [C, 1024] and width of a channel's bins [C, 1],
            float64.
        """
        width = torch.ldexp(torch.ones_like(self.minimum, dtype=torch.float64), self.exponent)[
            :, None
        ]
        return self._numbers(slice(None)) * width, width

    def _numbers(self, rows: Tensor | slice) -> Tensor:
        """Bin number j of every slot, [rows, 1024] int32."""
        seen = self.minimum[rows].nan_to_num(posinf=0.0)
        first = _bin(seen[None], self.exponent[rows])[0][:, None]
        slots = torch.arange(BINS, dtype=torch.int32, device=first.device)
        return first + (slots - first).bitwise_and(BINS - 1)

    def _cover(self, low: Tensor, high: Tensor) -> None:
        """Widen bins until the range [low, high] of each channel fits beside what was seen."""
        low, high = torch.minimum(self.minimum, low), torch.maximum(self.maximum, high)
        wanted = _least_exponent(low, high)
        fresh = self.minimum > self.maximum
        self.exponent = torch.where(fresh, wanted, self.exponent)
        while (narrow := (self.exponent < wanted).nonzero()[:, 0]).numel():
            half = (self._numbers(narrow) >> 1).bitwise_and_(BINS - 1).long()
            for sums in (self.count, self.fisher):
                if sums is not None:
                    sums[narrow] = torch.zeros_like(sums[narrow]).scatter_add_(
                        1, half, sums[narrow]
                    )
            self.exponent[narrow] += 1
        self.minimum, self.maximum = low, high


def _bin(values: Tensor, exponent: Tensor) -> Tensor:
    """floor(values / 2^exponent), exact since a power of two only moves the exponent; int32."""
    power = ((127 - exponent) << 23).view(torch.float32)  # 2^-exponent, by its bits
    return torch.floor(values * power).to(torch.int32)


def _least_exponent(low: Tensor, high: Tensor) -> Tensor:
    """The smallest exponents that fit [low, high] into the bins, [C] int32; monotone in it."""
    empty = low > high
    low, high = low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)
    least = torch.full_like(low, LOWEST_EXPONENT, dtype=torch.int32)
    for size, offset in ((torch.maximum(low.abs(), high.abs()), FINEST), ((high - low) / BINS, -1)):
        exponent = torch.frexp(size).exponent + offset
        least = torch.where(size > 0, torch.maximum(least, exponent), least)
    while (wide := _bin(high[None], least)[0] - _bin(low[None], least)[0] >= BINS).any():
        least += wide.to(torch.int32)
    return least
