"""The statistics of one layer, and which of them a codec needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvsmith.errors import explain
from kvsmith.geometry import LayerGeometry
from kvsmith.pipeline.statistics.base import Statistic
from kvsmith.pipeline.statistics.channel_histogram import ChannelHistogram
from kvsmith.pipeline.statistics.extremes import ChannelExtremes
from kvsmith.pipeline.statistics.token_histogram import TokenHistogram
from kvsmith.spec import NUQ, CodecSpec, Identity, TensorCodec

TensorName = Literal["k", "v"]


@dataclass(frozen=True)
class TokenView:
    """How values are normalised by the range of their token.

    Attributes:
        fraction: share of outliers left out, in [0, 0.5).
        group_size: channels of a head that share a range; None for the whole token.
    """

    fraction: float = 0.0
    group_size: int | None = None

    @property
    def name(self) -> str:
        """Part of a tensor's name."""
        return f"fraction{self.fraction:g}_group{self.group_size or 0}"


@dataclass(frozen=True)
class TensorPlan:
    """What is observed of keys, or of values.

    Attributes:
        channels: whether channels are (exact percentiles and a histogram each).
        tokens: normalisations whose values are.
    """

    channels: bool
    tokens: tuple[TokenView, ...]


@dataclass(frozen=True)
class Plan:
    """What is observed.

    Attributes:
        k, v: of keys and of values.
        total: tokens that will be seen.
        max_fraction: largest share of outliers that channel ranges can be asked for.
        fisher: whether Fisher information comes along.
    """

    k: TensorPlan
    v: TensorPlan
    total: int
    max_fraction: float
    fisher: bool


def needs(codec: TensorCodec) -> Literal["channels"] | TokenView | None:
    """What the parameters of a codec are fitted to.

    Returns:
        "channels", a TokenView, or None for a codec without parameters.

    Raises:
        ValueError: a codebook fitted to online ranges of channels; nothing observes these.
    """
    q = codec.quantizer
    if isinstance(q, Identity):
        return None
    if q.range == "calibrated":
        return "channels"
    if not isinstance(q, NUQ) or q.table != "fitted":
        return None
    if q.axis == "channel":
        remedy = "Use range: calibrated, or table: nf."
        raise ValueError(
            explain(
                "quantizer.axis",
                "value",
                "token for a fitted table with range online",
                q.axis,
                remedy,
            )
        )
    return TokenView(codec.fraction, q.group_size)


def plan_for(
    codecs: Iterable[CodecSpec],
    total: int,
    max_fraction: float,
    fractions: tuple[float, ...],
    fisher: bool,
) -> Plan:
    """Observe what the codecs need, and in any case channels of keys and tokens of values.

    Args:
        codecs: codecs that will be fitted.
        total: tokens that will be seen.
        max_fraction: largest share of outliers of channel ranges.
        fractions: shares of outliers that values are normalised with, whole tokens.
        fisher: whether Fisher information comes along.

    Raises:
        ValueError: a codec's fraction exceeds max_fraction, or it cannot be observed.
    """
    channels: dict[str, bool] = {"k": True, "v": False}
    tokens: dict[str, set[TokenView]] = {"k": set(), "v": {TokenView(f) for f in fractions}}
    for codec in codecs:
        for name, part in (("k", codec.k), ("v", codec.v)):
            need = needs(part)
            if isinstance(need, TokenView):
                tokens[name].add(need)
            elif need == "channels":
                check_fraction(part.fraction, max_fraction)
                channels[name] = True
    k, v = (
        TensorPlan(channels[n], tuple(sorted(tokens[n], key=lambda view: view.name)))
        for n in ("k", "v")
    )
    return Plan(k, v, total, max_fraction, fisher)


def check_fraction(fraction: float, max_fraction: float) -> None:
    """Refuse a share of outliers that channel statistics do not reach."""
    if fraction > max_fraction:
        remedy = f"Calibrate with max_fraction={fraction:g}."
        expected = f"at most max_fraction = {max_fraction:g}"
        raise ValueError(
            explain("outliers.fraction", "share of elements", expected, f"{fraction:g}", remedy)
        )


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

    def merge(self, other: LayerStatistics) -> None:
        """Take in what another worker's statistics of this layer have seen."""
        for mine, theirs in zip(self._all(), other._all(), strict=True):
            mine[1].merge(theirs[1])

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors, named `k.extremes.smallest`, `v.fraction0.01_group0.count`, ..."""
        return {
            f"{prefix}.{key}": t for prefix, s in self._all() for key, t in s.state_dict().items()
        }

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
