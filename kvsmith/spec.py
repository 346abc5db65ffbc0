"""What a cache is: frozen dataclasses that YAML, manifests and the runtime share.

A codec stores `x ~ Q(fill(x)) + S + A B^T`: `Q` a quantizer (uniform or non-uniform, NUQ), `S` a
sparse correction at outlier positions, `A B^T` a low-rank correction of the error of a block.
`layout.py` says which tensors each part owns and how many bytes they take.

Every quantizer works on values normalised to [-1, 1] by `(x - zero) / scale`. The range (scale,
zero) belongs to a channel or to a token; it is either calibrated once and kept in the bundle, or
computed online from the data.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from kvsmith.errors import explain
from kvsmith.eviction.policy import Eviction, KeepAll, Policy
from kvsmith.less.spec import Less
from kvsmith.strict import added_later, from_dict

Axis = Literal["channel", "token"]
Range = Literal["calibrated", "online"]
StoreDtype = Literal["float16", "bfloat16", "float32"]


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
    """

    quantizer: Identity | Uniform | NUQ
    outliers: StaticThreshold | TopK | None = None
    low_rank: LowRank | None = added_later(None)

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


@dataclass(frozen=True)
class LayerCodec:
    """How the tokens of one layer are stored, where others do it differently.

    Attributes:
        layer: its index.
        k: codec of the keys.
        v: codec of the values.
    """

    layer: int
    k: TensorCodec
    v: TensorCodec


@dataclass(frozen=True)
class CodecSpec:
    """How the tokens of a layer are stored.

    Attributes:
        k: codec of the keys.
        v: codec of the values.
        key_domain: "pre" stores keys before RoPE, "post" after it.
        store_dtype: dtype of online ranges and of outlier corrections.
        sinks: first tokens of a sequence that stay dense.
        recent: newest tokens that are always dense.
        block_size: tokens that are encoded at once; up to `recent + block_size - 1` newest tokens
            are dense.
        layers: layers with codecs of their own, by index; windows, domain and dtype are common.
    """

    k: TensorCodec
    v: TensorCodec
    key_domain: Literal["pre", "post"] = "pre"
    store_dtype: StoreDtype = "float16"
    sinks: int = 4
    recent: int = 16
    block_size: int = 16
    layers: tuple[LayerCodec, ...] = added_later(())

    def __post_init__(self) -> None:
        for name, least in (("sinks", 0), ("recent", 0), ("block_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    explain(
                        f"codec.{name}", "token count", f"at least {least}", getattr(self, name)
                    )
                )
        self._check_groups(self, "codec")
        least = 0
        for i, own in enumerate(self.layers):
            where = f"codec.layers[{i}]"
            if own.layer < least:
                raise ValueError(explain(f"{where}.layer", "index", f"at least {least}", own.layer))
            self._check_groups(own, where)
            least = own.layer + 1

    def _check_groups(self, sides: CodecSpec | LayerCodec, where: str) -> None:
        for name in ("k", "v"):
            side: TensorCodec = getattr(sides, name)
            q, low_rank, outliers = side.quantizer, side.low_rank, side.outliers
            if low_rank is not None and low_rank.largest > self.block_size:
                expected = f"at most block_size = {self.block_size}"
                raise ValueError(
                    explain(f"{where}.{name}.low_rank", "rank", expected, low_rank.largest)
                )
            if isinstance(q, Identity) or q.axis == "token" or q.group_size is None:
                continue
            if isinstance(outliers, TopK) and 0 < outliers.fraction * self.block_size <= 0.5:
                expected = f"0, or enough for one of the block_size = {self.block_size} tokens"
                raise ValueError(
                    explain(
                        f"{where}.{name}.outliers.fraction", "share", expected, outliers.fraction
                    )
                )
            if self.block_size % q.group_size:
                raise ValueError(
                    explain(
                        f"{where}.{name}.quantizer.group_size",
                        "tokens per group",
                        f"a divisor of block_size = {self.block_size}",
                        q.group_size,
                    )
                )

    def at(self, layer: int) -> CodecSpec:
        """The codec of one layer, alone."""
        if not self.layers:
            return self
        own = next((c for c in self.layers if c.layer == layer), self)
        return replace(self, k=own.k, v=own.v, layers=())

    def of_prompt(self) -> CodecSpec:
        """The codec of one layer as it stores the pages of the prompt."""
        k, v = (
            replace(c, low_rank=replace(c.low_rank, rank=c.low_rank.prompt_rank, prompt_rank=None))
            if c.low_rank and c.low_rank.prompt_rank
            else c
            for c in (self.k, self.v)
        )
        return replace(self, k=k, v=v)


@dataclass(frozen=True)
class CacheSpec:
    """The only description of a cache.

    Attributes:
        codec: how a token is stored.
        eviction: which tokens stay.
        page_size: tokens by which memory grows; a multiple of codec.block_size.
        less: what remains of those that go; None for nothing.
    """

    codec: CodecSpec
    eviction: Eviction = field(default_factory=KeepAll)
    page_size: int = 128
    less: Less | None = added_later(None)

    def __post_init__(self) -> None:
        if self.page_size < 1 or self.page_size % self.codec.block_size:
            raise ValueError(
                explain(
                    "cache.page_size",
                    "value",
                    f"a multiple of block_size = {self.codec.block_size}",
                    self.page_size,
                )
            )
        if isinstance(self.eviction, KeepAll):
            if self.less is not None:
                remedy = "Choose an eviction, or leave less out."
                raise ValueError(
                    explain("cache.less", "eviction", "one that evicts", "keep_all", remedy)
                )
            return
        _check_budget(self.codec, self.eviction)

    @staticmethod
    def parse(data: object, where: str = "cache") -> CacheSpec:
        """Read a spec from plain data; see `strict.from_dict` for the errors."""
        return from_dict(CacheSpec, data, where)


def slot_tokens(codec: CodecSpec, budget: int) -> int:
    """Encoded tokens of a layer that holds `budget` tokens: what the dense windows leave, in whole
    blocks.
    """
    free = budget - codec.sinks - codec.recent - codec.block_size
    return max(free, 0) // codec.block_size * codec.block_size


def _check_budget(codec: CodecSpec, policy: Policy) -> None:
    least = codec.sinks + codec.recent + 2 * codec.block_size
    if policy.budget < least:
        remedy = "Raise the budget, or lower the codec's windows or block_size."
        expected = f"at least sinks + recent + 2 blocks of the codec = {least}"
        raise ValueError(explain("eviction.budget", "token count", expected, policy.budget, remedy))
    most = policy.budget - codec.block_size
    if policy.sinks + policy.protected > most:
        raise ValueError(
            explain(
                "eviction",
                "sinks + recent",
                f"at most budget - block_size = {most}",
                policy.sinks + policy.protected,
            )
        )


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
