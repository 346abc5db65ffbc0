"""Keys or values of a token: a quantizer, outliers and a low-rank term, as frozen dataclasses.

`x ~ Q(fill(x)) + S + A B^T`: `Q` a quantizer (uniform or non-uniform, NUQ), `S` a sparse correction
at outlier positions, `A B^T` a low-rank correction of the error of a block.

Every quantizer works on values normalised to [-1, 1] by `(x - zero) / scale`. The range (scale,
zero) belongs to a channel or to a token; it is either calibrated once and kept in the bundle, or
computed online from the data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kvsmith.errors import explain
from kvsmith.strict import added_later

Axis = Literal["channel", "token"]
Range = Literal["calibrated", "online"]


@dataclass(frozen=True)
class Identity:
    """Tokens stay as they are, in the model's dtype."""

    kind: Literal["identity"] = field(default="identity", kw_only=True)


@dataclass(frozen=True)
class Uniform:
    """Equally spaced levels; asymmetric, since zero is free.

    Attributes:
        bits: code width, 1 to 8.
        axis: "channel" shares a range among tokens of one channel, "token" among channels of one
            token.
        group_size: axis "token": channels of one head per range, None for the whole token (all
            heads); axis "channel": tokens per range, None only for calibrated ranges.
        range: "calibrated" (axis "channel" alone) or "online".
    """

    kind: Literal["uniform"] = field(default="uniform", kw_only=True)
    bits: int = 4
    axis: Axis = "token"
    group_size: int | None = None
    range: Range = "online"

    def __post_init__(self) -> None:
        _check_quantizer(self)


@dataclass(frozen=True)
class NUQ:
    """Non-uniform levels: a codebook of 2^bits values. Source: KVQuant s3.3, arXiv:2401.18079v6.

    Attributes:
        bits, axis, group_size, range: as in `Uniform`.
        table: "fitted" to the calibration data (owned by the bundle) or "nf", the quantiles of a
            normal law.
        q_norm: decode with a codebook shifted and scaled to keep mean and deviation of the fitted
            values (KVQuant v1, Q-Norm).
    """

    kind: Literal["nuq"] = field(default="nuq", kw_only=True)
    bits: int = 4
    axis: Axis = "token"
    group_size: int | None = None
    range: Range = "online"
    table: Literal["fitted", "nf"] = "fitted"
    q_norm: bool = False

    def __post_init__(self) -> None:
        _check_quantizer(self)
        if self.q_norm and self.table != "fitted":
            raise ValueError(
                explain("quantizer.q_norm", "value", "false with table = nf", self.q_norm)
            )


@dataclass(frozen=True)
class StaticThreshold:
    """Outliers under calibrated channel ranges: N = round(fraction * KV width) corrections a token.

    Attributes:
        fraction: share of elements that have a slot, in [0, 0.5).
        range_fraction: share of elements that the calibrated range leaves out, half at either end;
            None is `fraction`, as published. A smaller share keeps tokens with more outliers than
            slots from being clipped.
        select: "beyond_range" corrects elements outside the range, the farthest first, and leaves
            unused slots empty, as published; "largest_error" corrects the N elements of the token
            that are coded worst.
    """

    kind: Literal["static_threshold"] = field(default="static_threshold", kw_only=True)
    fraction: float = 0.01
    range_fraction: float | None = None
    select: Literal["beyond_range", "largest_error"] = "beyond_range"

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)
        if self.range_fraction is not None:
            _check_fraction(self.range_fraction, "range_fraction")


@dataclass(frozen=True)
class TopK:
    """Extremes of a vector of n elements, found online: round(fraction * n) of them, half the
    largest, half the smallest.

    The vector is a token over all heads where tokens have ranges (axis "token"), and a channel over
    the tokens of a block where channels have them (axis "channel"), whatever the length of the
    text. They are left out of the ranges; an odd one is the next extreme that lies farther from the
    median.

    Attributes:
        fraction: share of elements in [0, 0.5).
    """

    kind: Literal["top_k"] = field(default="top_k", kw_only=True)
    fraction: float = 0.01

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)


@dataclass(frozen=True)
class LowRank:
    """The error of each head and block as a product A B^T of `rank` columns. Source: GEAR,
    arXiv:2403.05527v4, section 3.

    Attributes:
        rank: columns R, at most block_size and the head dim.
        prompt_rank: columns in pages begun by the first forward pass; None is `rank`.
        iterations: subspace iterations, 1 to 16.
        bits: width of the factors' elements, 2 to 8, with one scale a column; None keeps them in
            store_dtype.
    """

    rank: int = 2
    prompt_rank: int | None = None
    iterations: int = 3
    bits: int | None = None

    def __post_init__(self) -> None:
        ranks = [self.rank] if self.prompt_rank is None else [self.rank, self.prompt_rank]
        for name, value, least, most in (
            ("rank", min(ranks), 1, "the head dim"),
            ("iterations", self.iterations, 1, 16),
            ("bits", 2 if self.bits is None else self.bits, 2, 8),
        ):
            if value < least or (isinstance(most, int) and value > most):
                expected = f"between {least} and {most}"
                raise ValueError(explain(f"low_rank.{name}", "value", expected, value))

    @property
    def largest(self) -> int:
        """The larger of both ranks."""
        return max(self.rank, self.prompt_rank or 0)


@dataclass(frozen=True)
class TensorCodec:
    """How keys, or values, are stored.

    Attributes:
        quantizer: the dense part Q.
        outliers: the sparse part S, None for nothing.
        low_rank: the low-rank part A B^T, None for nothing.
        rotation: orthogonal turn of each head's channels before they are quantized, undone on
            queries and outputs: "hadamard" mixes all channels and needs no calibration, "given" is
            a matrix for each head that the bundle holds. Keys must be stored after RoPE.
    """

    quantizer: Identity | Uniform | NUQ
    outliers: StaticThreshold | TopK | None = None
    low_rank: LowRank | None = added_later(None)
    rotation: Literal["hadamard", "given"] | None = added_later(None)

    def __post_init__(self) -> None:
        q, o = self.quantizer, self.outliers
        calibrated = not isinstance(q, Identity) and q.range == "calibrated"
        if isinstance(o, StaticThreshold) and not calibrated:
            raise ValueError(
                explain(
                    "outliers.kind",
                    "static_threshold",
                    "paired with a quantizer of range calibrated",
                    q.kind,
                )
            )
        if isinstance(o, TopK) and (isinstance(q, Identity) or calibrated):
            raise ValueError(
                explain(
                    "outliers.kind",
                    "top_k",
                    "paired with a quantizer of online ranges",
                    q.kind,
                    "Use static_threshold with calibrated ranges.",
                )
            )
        if self.low_rank is not None and isinstance(q, Identity):
            raise ValueError(explain("low_rank", "quantizer", "one that leaves an error", q.kind))
        if self.rotation is not None and (isinstance(q, Identity) or calibrated):
            raise ValueError(explain("rotation", "quantizer", "one of online ranges", q.kind))

    @property
    def fraction(self) -> float:
        """Share of elements that are outliers, 0 without an outlier part."""
        return self.outliers.fraction if self.outliers else 0.0

    @property
    def range_fraction(self) -> float:
        """Share of elements that the ranges leave out, 0 without an outlier part."""
        if isinstance(self.outliers, StaticThreshold) and self.outliers.range_fraction is not None:
            return self.outliers.range_fraction
        return self.fraction


def _check_quantizer(q: Uniform | NUQ) -> None:
    where = f"quantizer({q.kind})"
    if not 1 <= q.bits <= 8:
        raise ValueError(explain(f"{where}.bits", "value", "between 1 and 8", q.bits))
    if q.group_size is not None and q.group_size < 1:
        raise ValueError(explain(f"{where}.group_size", "value", "positive or null", q.group_size))
    if q.range == "calibrated" and (q.axis != "channel" or q.group_size is not None):
        raise ValueError(
            explain(
                where,
                "range calibrated",
                "used with axis channel and no group_size",
                f"{q.axis}, {q.group_size}",
            )
        )
    if q.range == "online" and q.axis == "channel" and q.group_size is None:
        raise ValueError(
            explain(
                where,
                "group_size",
                "given for online channel ranges",
                "null",
                "Set tokens per group, e.g. 32.",
            )
        )


def _check_fraction(fraction: float, name: str = "fraction") -> None:
    if not 0.0 <= fraction < 0.5:
        raise ValueError(explain(f"outliers.{name}", "share of elements", "in [0, 0.5)", fraction))
