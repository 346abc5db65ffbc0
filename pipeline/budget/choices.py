"""What one side of a layer may be, and the bytes that it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from kvsmith.errors import explain
from kvsmith.geometry import ModelGeometry
from kvsmith.layout import outlier_slots
from kvsmith.sizes import cache_bytes
from kvsmith.spec import CacheSpec, CodecSpec, Identity, LayerCodec, LowRank, TensorCodec

SIDES = ("k", "v")
Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Levels:
    """The choices, from few bits to many.

    Attributes:
        names: a word for each, such as "3b 1%", or "3b 1% w64" where windows are chosen.
        codecs: each as a codec of all layers; sinks, blocks and domain are the same in all.
    """

    names: tuple[str, ...]
    codecs: tuple[CodecSpec, ...]

    def __len__(self) -> int:
        return len(self.codecs)

    def side(self, level: int, name: str) -> TensorCodec:
        """Codec of the keys or values at a level."""
        codec = self.codecs[level]
        return codec.k if name == "k" else codec.v

    def alone(self, layer: int, name: str, level: int) -> CodecSpec:
        """The codec that quantizes one side of one layer, and nothing else."""
        exact, side = self.exact, self.side(level, name)
        k, v = (side, exact.v) if name == "k" else (exact.k, side)
        return replace(exact, layers=(self.layer(layer, k, v, level, exact.recent),))

    def window_alone(self, layer: int, level: int) -> CodecSpec:
        """Nothing quantized, and one layer with the window of a level."""
        exact = self.exact
        own = self.layer(layer, exact.k, exact.v, level, exact.recent)
        return replace(exact, layers=(own,))

    def layer(
        self, layer: int, k: TensorCodec, v: TensorCodec, level: int, common: int
    ) -> LayerCodec:
        """A layer with codecs of its own and the window of a level, where others have `common`."""
        recent = self.codecs[level].recent
        return LayerCodec(layer, k, v, None if recent == common else recent)

    @property
    def windows(self) -> tuple[int, ...]:
        """Newest dense tokens of each level."""
        return tuple(c.recent for c in self.codecs)

    @property
    def exact(self) -> CodecSpec:
        """Nothing quantized, the windows of the first level."""
        return replace(self.codecs[0], k=TensorCodec(Identity()), v=TensorCodec(Identity()))


def levels(
    template: CodecSpec,
    bits: Sequence[int],
    fractions: Sequence[float],
    shape: ModelGeometry,
    ranks: Sequence[int] = (0,),
    recents: Sequence[int] = (),
) -> Levels:
    """Every width with every share of outliers that gives another number of slots, every rank and
    every dense window.

    Args:
        template: kind of quantizers and outliers, and the windows.
        bits: code widths.
        fractions: shares of outliers.
        shape: the model.
        ranks: of the low-rank term; 0 is none.
        recents: newest tokens that stay dense; none for those of the template.

    Raises:
        ValueError: the template quantizes nothing, or has layers of its own.
    """
    if template.layers or any(isinstance(c.quantizer, Identity) for c in (template.k, template.v)):
        expected = "a codec that quantizes keys and values of all layers alike"
        raise ValueError(explain("fit.template", "codec", expected, "another"))
    names, codecs, seen = [], [], set()
    windows = sorted(recents) or [template.recent]
    every = product(windows, sorted(bits), sorted(fractions), sorted(ranks))
    for recent, width, fraction, rank in every:
        k, v = (_vary(c, width, fraction, rank) for c in (template.k, template.v))
        slots = tuple(
            tuple(
                outlier_slots(c, g.kv_heads, dim, template.block_size)
                for c, dim in ((k, g.k_dim), (v, g.v_dim))
            )
            for g in (shape.layers[i] for i in shape.owners)
        )
        if (recent, width, slots, rank) not in seen:
            seen.add((recent, width, slots, rank))
            share = f" {fraction:.1%}" if any(map(any, slots)) else ""
            words = [f"{width}b{share}", f"r{rank}" if rank else ""]
            words.append(f"w{recent}" if len(windows) > 1 else "")
            names.append(" ".join(filter(None, words)))
            codecs.append(replace(template, k=k, v=v, recent=recent))
    return Levels(tuple(names), tuple(codecs))


def _vary(codec: TensorCodec, bits: int, fraction: float, rank: int) -> TensorCodec:
    assert not isinstance(codec.quantizer, Identity)
    term = None
    if rank:
        term = replace(codec.low_rank or LowRank(bits=4), rank=rank, prompt_rank=None)
    outliers = None
    if fraction and codec.outliers is not None:
        outliers = replace(codec.outliers, fraction=fraction)
    quantizer = replace(codec.quantizer, bits=bits)
    return replace(codec, quantizer=quantizer, outliers=outliers, low_rank=term)


@dataclass(frozen=True)
class Costs:
    """Bytes of one row, dense tokens in bfloat16; they add up.

    Attributes:
        fixed: of everything that no choice changes.
        sides: [layers that own tokens, 2, levels] int64, bytes of keys and values by level; a
            window's count with the keys.
        windows: newest dense tokens of each level, in which keys and values of a layer agree; empty
            where it is the same for all.
    """

    fixed: int
    sides: Tensor
    windows: tuple[int, ...] = ()

    def groups(self) -> list[list[int]]:
        """The levels of each window."""
        windows = self.windows or (0,) * self.sides.shape[-1]
        return [[i for i, w in enumerate(windows) if w == own] for own in dict.fromkeys(windows)]


def costs(options: Levels, shape: ModelGeometry, tokens: int) -> Costs:
    """What every choice costs at a length, by the runtime's own arithmetic."""
    positions = int(options.exact.key_domain == "pre")

    def total(codec: CodecSpec) -> int:
        return cache_bytes(CacheSpec(codec), shape, 1, tokens, torch.bfloat16, positions).total

    exact = options.exact
    whole = total(exact)
    sides = torch.zeros((len(shape.owners), 2, len(options)), dtype=torch.int64)
    for n, i in enumerate(shape.owners):
        for s, name in enumerate(SIDES):
            for level in range(len(options)):
                before = whole if name == "k" else total(options.window_alone(i, level))
                sides[n, s, level] = total(options.alone(i, name, level)) - before
    # Differences from dense storage are negative: count every side from its smallest choice up.
    least = sides.amin(-1, keepdim=True)
    return Costs(whole + int(least.sum()), sides - least, options.windows)


def assemble(options: Levels, shape: ModelGeometry, picks: Sequence[Sequence[int]]) -> CodecSpec:
    """The codec of a choice: the most common pair, and the layers that differ from it.

    Keys and values of a layer have levels of one window.

    Args:
        options: the choices.
        shape: the model.
        picks: for each layer that owns tokens the level of its keys and of its values.
    """
    pairs = [(p[0], p[1]) for p in picks]
    common = max(sorted(set(pairs)), key=pairs.count)
    whole = options.codecs[common[0]]
    own = tuple(
        options.layer(i, options.side(k, "k"), options.side(v, "v"), k, whole.recent)
        for i, (k, v) in zip(shape.owners, pairs, strict=True)
        if (k, v) != common
    )
    return replace(whole, v=options.side(common[1], "v"), layers=own)


def parameters_of(
    fitted: Sequence[Parameters], shape: ModelGeometry, picks: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """The tensors of a choice.

    Args:
        fitted: parameters of every level, of all layers.
        shape, picks: as in `assemble`.
    """
    found = {}
    for i, pair in zip(shape.owners, picks, strict=True):
        for name, level in zip(SIDES, pair, strict=True):
            prefix = f"layers.{i}.{name}."
            found.update({n: t for n, t in fitted[level].items() if n.startswith(prefix)})
    return found
