"""The shape of a model as its cache sees it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvsmith.cla import check_owner
from kvsmith.errors import explain


@dataclass(frozen=True)
class LayerGeometry:
    """One attention layer.

    Attributes:
        kv_heads: key/value heads, H.
        query_heads: query heads, H * G.
        k_dim, v_dim: channels of one key head and of one value head, D.
        window: tokens a query can see back, itself included; None without a sliding window.
    """

    kv_heads: int
    query_heads: int
    k_dim: int
    v_dim: int
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("kv_heads", "query_heads", "k_dim", "v_dim"):
            if getattr(self, name) < 1:
                raise ValueError(explain(f"layer.{name}", "value", "positive", getattr(self, name)))
        if self.query_heads % self.kv_heads:
            raise ValueError(
                explain(
                    "layer.query_heads",
                    "value",
                    f"a multiple of kv_heads = {self.kv_heads}",
                    self.query_heads,
                )
            )

    @property
    def elements(self) -> int:
        """Key and value elements of one token."""
        return self.kv_heads * (self.k_dim + self.v_dim)


@dataclass(frozen=True)
class ModelGeometry:
    """All layers, in order.

    Attributes:
        layers: one entry a layer.
        owner: for each layer the layer whose tokens it reads; itself where it owns its tokens.
    """

    layers: tuple[LayerGeometry, ...]
    owner: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError(explain("geometry.layers", "layer list", "non-empty", "nothing"))
        if not self.owner:
            object.__setattr__(self, "owner", tuple(range(len(self.layers))))
        check_owner(self.owner, len(self.layers), "geometry.owner")

    @property
    def owners(self) -> tuple[int, ...]:
        """Indices of the layers that store tokens."""
        return tuple(i for i, o in enumerate(self.owner) if i == o)

    def readers(self, owner: int) -> tuple[int, ...]:
        """Indices of the layers that read a layer's tokens, itself first."""
        return tuple(i for i, o in enumerate(self.owner) if o == owner)

    def joined(self, owner: int) -> LayerGeometry:
        """An owning layer with the query heads of all that read it: for each KV head those of each
        reader in turn.
        """
        heads = sum(self.layers[i].query_heads for i in self.readers(owner))
        return replace(self.layers[owner], query_heads=heads)

    @property
    def elements(self) -> int:
        """Key and value elements of one token over all owning layers."""
        return sum(self.layers[i].elements for i in self.owners)
