"""What a cache is: frozen dataclasses that YAML, manifests and the runtime share.

`tensor_codec.py` says how keys or values are coded, this page what they are coded in: windows,
layers, pages, eviction. `layout.py` says which tensors each part owns and how many bytes they take.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from kvsmith.errors import explain
from kvsmith.eviction.policy import Eviction, KeepAll, Policy
from kvsmith.less.spec import Less
from kvsmith.strict import added_later, from_dict
from kvsmith.tensor_codec import NUQ as NUQ
from kvsmith.tensor_codec import Identity as Identity
from kvsmith.tensor_codec import LowRank as LowRank
from kvsmith.tensor_codec import StaticThreshold as StaticThreshold
from kvsmith.tensor_codec import TensorCodec as TensorCodec
from kvsmith.tensor_codec import TopK as TopK
from kvsmith.tensor_codec import Uniform as Uniform

StoreDtype = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class LayerCodec:
    """How the tokens of one layer are stored, where others do it differently.

    Attributes:
        layer: its index.
        k: codec of the keys.
        v: codec of the values.
        recent: newest tokens that are always dense; None for as many as elsewhere.
    """

    layer: int
    k: TensorCodec
    v: TensorCodec
    recent: int | None = added_later(None)


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
        layers: layers with codecs of their own, by index; sinks, block_size, domain and dtype are
            common.
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
            if (recent := own.recent) is not None and recent < 0:
                raise ValueError(explain(f"{where}.recent", "token count", "at least 0", recent))
            self._check_groups(own, where)
            least = own.layer + 1

    def _check_groups(self, sides: CodecSpec | LayerCodec, where: str) -> None:
        if sides.k.rotation is not None and self.key_domain != "post":
            remedy = "RoPE does not commute with a rotation; set key_domain: post."
            got = repr(self.key_domain)
            raise ValueError(explain(f"{where}.k.rotation", "key_domain", "post", got, remedy))
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
        recent = self.recent if own.recent is None else own.recent
        return replace(self, k=own.k, v=own.v, recent=recent, layers=())

    @property
    def most_recent(self) -> int:
        """The longest dense window of newest tokens that a layer has."""
        return max([self.recent, *(c.recent for c in self.layers if c.recent is not None)])

    @property
    def takes_rotations(self) -> bool:
        """Whether a side of a layer has `rotation: given`."""
        keys, values = ([c.k for c in self.layers], [c.v for c in self.layers])
        return any(side.rotation == "given" for side in (self.k, self.v, *keys, *values))

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
    if codec.takes_rotations:
        expected, remedy = "hadamard where tokens are evicted", "Use rotation: hadamard."
        raise ValueError(explain("codec.rotation", "value", expected, "given", remedy))
    least = codec.sinks + codec.most_recent + 2 * codec.block_size
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
