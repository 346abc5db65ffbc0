"""The statistics of one layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from kvsmith.errors import explain
from kvsmith.geometry import LayerGeometry
from kvsmith.pipeline.statistics.base import Statistic
from kvsmith.pipeline.statistics.channel_histogram import ChannelHistogram
from kvsmith.pipeline.statistics.extremes import ChannelExtremes
from kvsmith.pipeline.statistics.plan import Plan, TensorName, TokenView, not_observed
from kvsmith.pipeline.statistics.token_histogram import TokenHistogram


class LayerStatistics:
    """Statistics of the keys and values of one layer.

    Attributes:
        extremes, histograms: statistics of channels by tensor, "k" or "v", where the plan has them.
        tokens: statistics of tokens by tensor and normalisation.

    Args:
        plan: what is observed.
        layer: heads and channels.
        device: where to work.
    """

    def __init__(
        self, plan: Plan, layer: LayerGeometry, device: torch.device | str = "cpu"
    ) -> None:
        self.plan = plan
        self.layer = layer
        self.extremes: dict[str, ChannelExtremes] = {}
        self.histograms: dict[str, ChannelHistogram] = {}
        self.tokens: dict[str, dict[TokenView, TokenHistogram]] = {"k": {}, "v": {}}
        for name, part, dim in (("k", plan.k, layer.k_dim), ("v", plan.v, layer.v_dim)):
            width = layer.kv_heads * dim
            if part.channels:
                self.extremes[name] = ChannelExtremes(width, plan.total, plan.max_fraction, device)
                self.histograms[name] = ChannelHistogram(width, plan.fisher, device)
            for view in part.tokens:
                slots = round(view.fraction * width)
                self.tokens[name][view] = TokenHistogram(
                    slots, view.group_size or 0, plan.fisher, device
                )

    def update(self, name: TensorName, values: Tensor, fisher: Tensor | None) -> None:
        """Take in keys or values of some tokens.

        Args:
            name: "k" or "v".
            values: [N, H, D] float32.
            fisher: [N, H, D] float32 squared gradients; None by a plan without.
        """
        for _, statistic in self._of(name):
            statistic.update(values, fisher)

    def channels(self, name: TensorName) -> tuple[ChannelExtremes, ChannelHistogram]:
        """Statistics of the channels of keys or values.

        Raises:
            ValueError: they were not observed.
        """
        if name not in self.extremes:
            raise not_observed(name, "channels")
        return self.extremes[name], self.histograms[name]

    def view(self, name: TensorName, view: TokenView) -> TokenHistogram:
        """Statistics of keys or values normalised by token.

        Raises:
            ValueError: they were not observed.
        """
        if view not in self.tokens[name]:
            asked = f"tokens with fraction {view.fraction:g}, group_size {view.group_size}"
            raise not_observed(name, asked)
        return self.tokens[name][view]

    def merge(self, other: LayerStatistics) -> None:
        """Take in what another worker's statistics of this layer have seen."""
        for mine, theirs in zip(self._all(), other._all(), strict=True):
            mine[1].merge(theirs[1])

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors, named `k.extremes.smallest`, `v.fraction0.01_group0.count`, ..."""
        return {
            f"{prefix}.{key}": t for prefix, s in self._all() for key, t in s.state_dict().items()
        }

    def tensors(self) -> Iterator[Tensor]:
        """The tensors as they are, on their own device."""
        for _, statistic in self._all():
            yield from (t for t in vars(statistic).values() if isinstance(t, Tensor))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: tensors are missing, of another shape, or too many.
        """
        unread = set(state)
        for prefix, statistic in self._all():
            part = {
                k.removeprefix(f"{prefix}."): t
                for k, t in state.items()
                if k.startswith(f"{prefix}.")
            }
            statistic.load_state_dict(part)
            unread -= {f"{prefix}.{key}" for key in part}
        if unread:
            names = ", ".join(sorted(unread))
            raise ValueError(
                explain(
                    "statistics",
                    "tensors",
                    "those of the plan",
                    f"also {names}",
                    "Calibrate again.",
                )
            )

    def _all(self) -> Iterator[tuple[str, Statistic]]:
        yield from self._of("k")
        yield from self._of("v")

    def _of(self, name: str) -> Iterator[tuple[str, Statistic]]:
        if name in self.extremes:
            yield f"{name}.extremes", self.extremes[name]
            yield f"{name}.histogram", self.histograms[name]
        for view, statistic in self.tokens[name].items():
            yield f"{name}.{view.name}", statistic
