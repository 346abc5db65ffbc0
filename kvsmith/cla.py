"""Cross-layer attention: which layer's keys and values each layer reads.

A map gives each layer an owner, itself or an earlier layer; only owners store tokens. It belongs to
the model, whose weights are made for it: `config.kv_owner` holds it, `kvsmith.hf.share` sets it.

Source: Cross-Layer Attention, arXiv:2405.12981. Differs: groups may leave layers at either end
dense, and a map may be anything that reads backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from kvsmith.errors import explain


@dataclass(frozen=True)
class Groups:
    """Neighbours share: the first layer of each group of `factor` owns.

    Attributes:
        factor: layers of a group; the last group may be smaller.
        front, back: layers at either end that keep their own.
    """

    kind: Literal["groups"] = field(default="groups", kw_only=True)
    factor: int = 2
    front: int = 0
    back: int = 0

    def __post_init__(self) -> None:
        for name, least in (("factor", 1), ("front", 0), ("back", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    explain(f"cla.{name}", "layers", f"at least {least}", getattr(self, name))
                )

    def resolve(self, layers: int) -> tuple[int, ...]:
        """Owner of each of `layers` layers.

        Raises:
            ValueError: there are too few layers for one whole group.
        """
        middle = layers - self.front - self.back
        if self.factor > middle:
            expected = f"at most the {max(middle, 0)} layers that share"
            raise ValueError(explain("cla.factor", "value", expected, self.factor))
        end = layers - self.back
        return tuple(
            layer - (layer - self.front) % self.factor if self.front <= layer < end else layer
            for layer in range(layers)
        )


@dataclass(frozen=True)
class Map:
    """Any map.

    Attributes:
        owner: for each layer the layer whose tokens it reads.
    """

    kind: Literal["map"] = field(default="map", kw_only=True)
    owner: tuple[int, ...]

    def resolve(self, layers: int) -> tuple[int, ...]:
        """`owner`, checked.

        Raises:
            ValueError: another number of layers, or an owner that does not own.
        """
        check_owner(self.owner, layers, "cla.owner")
        return self.owner


Cla = Groups | Map


def check_owner(owner: Sequence[int], layers: int, where: str) -> None:
    """Refuse a map that cannot be.

    Raises:
        ValueError: the length, an owner after its reader, or an owner that reads another.
    """
    if len(owner) != layers:
        raise ValueError(explain(where, "length", f"one entry a layer ({layers})", len(owner)))
    for layer, own in enumerate(owner):
        if type(own) is not int or not 0 <= own <= layer:
            raise ValueError(explain(f"{where}[{layer}]", "owner", "this or an earlier layer", own))
        if owner[own] != own:
            raise ValueError(explain(f"{where}[{layer}]", "owner", "a layer that owns", own))
