"""What is observed of a layer, and what a codec needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from kvsmith.errors import explain
from kvsmith.spec import NUQ, CodecSpec, Identity, LayerCodec, TensorCodec

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


Need = Literal["channels"] | TokenView


def needs(codec: TensorCodec) -> Need | None:
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
        sides: list[CodecSpec | LayerCodec] = [codec, *codec.layers]
        for name, part in (pair for own in sides for pair in (("k", own.k), ("v", own.v))):
            need = needs(part)
            if isinstance(need, TokenView):
                tokens[name].add(need)
            elif need == "channels":
                check_fraction(part.range_fraction, max_fraction)
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


def not_observed(tensor: TensorName, view: str) -> ValueError:
    """The error of asking for what the plan left out."""
    remedy = "Calibrate with codec= set to this codec."
    return ValueError(explain("statistics", f"view of {tensor}", "observed", view, remedy))
