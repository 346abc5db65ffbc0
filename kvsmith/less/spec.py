"""What remains of evicted tokens, and the tensors that training finds for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kvsmith.errors import explain
from kvsmith.geometry import LayerGeometry


@dataclass(frozen=True)
class Exponential:
    """Features that make the state R further tokens: phi_r(q) = exp(q u_r / sqrt(D) + c_r),
    psi_r(k) = exp(k w_r / sqrt(D) + b_r).

    Attention over the state is then ordinary softmax over keys u_r with a logit bias.

    Source: feature maps in the manner of Hedgehog (arXiv:2402.04347), with a bias each.
    """

    kind: Literal["exponential"] = field(default="exponential", kw_only=True)


@dataclass(frozen=True)
class MLP:
    """The paper's kernels: two layers a head with GELU, made positive by abs. Source: LESS s3.1.

    Attributes:
        hidden: width of the hidden layer; the paper's is 512.
    """

    kind: Literal["mlp"] = field(default="mlp", kw_only=True)
    hidden: int = 512

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(explain("less.features.hidden", "width", "positive", self.hidden))


Features = Exponential | MLP


@dataclass(frozen=True)
class Less:
    """A state of R features a KV head.

    Attributes:
        features: how queries and keys become features.
        rank: R of every layer.
        ranks: R of each layer that evicts, in order, where they differ; empty takes `rank`.
        store_dtype: of the state's values; their logits are float32.
    """

    features: Features = field(default_factory=Exponential)
    rank: int = 8
    ranks: tuple[int, ...] = ()
    store_dtype: Literal["float16", "float32", "int8"] = "float16"

    def __post_init__(self) -> None:
        for name, value in [("rank", self.rank), *(("ranks", r) for r in self.ranks)]:
            if value < 1:
                raise ValueError(explain(f"less.{name}", "features", "at least 1", value))

    def rank_of(self, index: int) -> int:
        """R of the layer that is `index`-th among those that evict."""
        return self.ranks[index] if self.ranks else self.rank


def less_tensors(
    features: Features, layer: LayerGeometry, rank: int
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Tensors that a bundle holds for the state of one layer, all float32.

    Returns:
        name -> (shape, meaning), `phi.*` for queries [Hq, ...] and `psi.*` for keys [H, ...]; the
        query heads are those of all layers that read this one, see `ModelGeometry.joined`.
    """
    H, Hq, D, R = layer.kv_heads, layer.query_heads, layer.k_dim, rank
    if isinstance(features, Exponential):
        return {
            "phi.weight": ((Hq, D, R), "keys u of the state's tokens"),
            "phi.bias": ((Hq, R), "logit"),
            "psi.weight": ((H, D, R), "directions w that fold keys"),
            "psi.bias": ((H, R), "logit"),
        }
    N = features.hidden
    return {
        "phi.first": ((Hq, D, N), "first layer"),
        "phi.second": ((Hq, N, R), "second layer"),
        "psi.first": ((H, D, N), "first layer"),
        "psi.second": ((H, N, R), "second layer"),
        "psi.third": ((H, R, R), "mixing of features"),
        "psi.s1": ((H, R), "scale of the features"),
        "psi.s2": ((H, R), "scale of the mixing"),
    }
