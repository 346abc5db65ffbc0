"""Tokens against bits: with a trained state of LESS, how many tokens stay, and in how many bits.

For each level, the same in all layers, and for tokens as they are: as many tokens as the bytes
allow. Each such cache is measured through the real path, and the best is taken. Fewer tokens than
fit are not tried, and layers do not differ.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvsmith.errors import explain
from kvsmith.eviction.policy import KeepAll
from kvsmith.geometry import ModelGeometry
from kvsmith.layout import check_geometry
from kvsmith.pipeline.budget.choices import Levels, Parameters
from kvsmith.pipeline.budget.sensitivity import Meter
from kvsmith.pipeline.less.options import scaled
from kvsmith.pipeline.less.result import Trained, cut, exported, read_trained
from kvsmith.sizes import cache_bytes
from kvsmith.spec import CacheSpec, CodecSpec

DENSE = "as they are"


@dataclass(frozen=True)
class State:
    """What train.py left: features, and the eviction that they serve.

    Attributes:
        record: its less.json.
        tensors: features of the largest rank.
    """

    record: Trained
    tensors: Mapping[str, Tensor]

    @staticmethod
    def read(folder: Path, shape: ModelGeometry) -> State:
        """Read a training for a model of this shape.

        Raises:
            FileNotFoundError, ValueError: there is none, it is damaged, or of another model.
        """
        record, tensors = read_trained(folder)
        if record.source.base_model.geometry != shape:
            expected, got = "trained for this model", record.source.base_model.id
            raise ValueError(explain("fit.trained", "state", expected, f"one for {got}"))
        return State(record, tensors)

    def cache(self, codec: CodecSpec, tokens: int | None) -> CacheSpec:
        """A cache that keeps `tokens` tokens of a layer and a state; None keeps all of them."""
        policy = self.record.source.cache.eviction
        assert not isinstance(policy, KeepAll)
        if tokens is None:
            return CacheSpec(codec)
        less = exported(self.record.source.training, self.record.ranks)
        return CacheSpec(codec, scaled(policy, tokens / policy.budget, tokens), less=less)

    def parameters(self, spec: CacheSpec, codebooks: Parameters) -> dict[str, Tensor]:
        """Tensors of a cache: codebooks of its level, and the features that it uses."""
        if spec.less is None:
            return dict(codebooks)
        return {**codebooks, **cut(spec, self.record.source.base_model, self.tensors)}


@dataclass(frozen=True)
class Kept:
    """The cache of one level that keeps most tokens.

    Attributes:
        name: of the level.
        level: its index; None for tokens as they are.
        spec: the cache.
        tokens: that a layer keeps; None for all.
        nbytes: of one row.
        kld: on calibration windows, nats a token, [n]; empty before it is measured.
        heldout: on held-out windows; empty without a check.
    """

    name: str
    level: int | None
    spec: CacheSpec
    tokens: int | None
    nbytes: int
    kld: tuple[float, ...] = ()
    heldout: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """Mean divergence on calibration windows."""
        return sum(self.kld) / len(self.kld)

    def plain(self) -> dict[str, Any]:
        """Plain data, for kept.json."""
        return {
            "name": self.name,
            "tokens": self.tokens,
            "bytes": self.nbytes,
            "kld": list(self.kld),
            "kld_heldout": list(self.heldout),
        }


def candidates(
    options: Levels, state: State, shape: ModelGeometry, context: int, budget: int, where: str
) -> tuple[Kept, ...]:
    """The cache of each level that keeps most tokens; levels that cannot keep any are left out.

    Args:
        options: the levels.
        state: what remains of tokens that go.
        shape: the model.
        context: tokens at which bytes are counted.
        budget: bytes of one row, features included.
        where: configuration path of the budget, for errors.

    Raises:
        ValueError: nothing fits; names the smallest possible.
    """
    rotated = int(options.exact.key_domain == "pre")
    named: list[tuple[str, int | None, CodecSpec]] = [(DENSE, None, options.exact)]
    named += [(n, i, options.codecs[i]) for i, n in enumerate(options.names)]
    found, smallest = [], []
    for name, level, codec in named:

        def price(tokens: int | None, codec: CodecSpec = codec) -> int:
            spec = state.cache(codec, tokens)
            return cache_bytes(spec, shape, 1, context, torch.bfloat16, rotated).total

        # Whole blocks of tokens go, so that chunks of a block evict as single tokens do.
        block = codec.block_size
        least = -(-(codec.sinks + codec.recent + 2 * block) // block) * block
        counts = range(least, max(context, least + 1), block)
        smallest.append(min(price(least), price(None)))
        fitting = bisect_right(counts, budget, key=price)
        if fitting or price(None) <= budget:
            tokens = None if price(None) <= budget else counts[fitting - 1]
            spec = state.cache(codec, tokens)
            check_geometry(spec, shape)
            found.append(Kept(name, level, spec, tokens, price(tokens)))
    if not found:
        bits = 8 * min(smallest) / (shape.elements * context)
        expected = (
            f"at least {bits:.3f} all-in bits ({min(smallest):,} bytes) at {context:,} tokens"
        )
        raise ValueError(explain(where, "budget", expected, f"{budget:,} bytes"))
    return tuple(found)


def measured(
    caches: Sequence[Kept],
    fitted: Sequence[Parameters],
    state: State,
    meter: Meter,
    heldout: Meter | None,
) -> list[Kept]:
    """The same, measured; the best on calibration windows first."""
    found = []
    for one in caches:
        own = state.parameters(one.spec, {} if one.level is None else fitted[one.level])
        held = heldout.kld(one.spec, own).tolist() if heldout else []
        kld = meter.kld(one.spec, own).tolist()
        found.append(replace(one, kld=tuple(kld), heldout=tuple(held)))
    return sorted(found, key=lambda k: k.mean)
