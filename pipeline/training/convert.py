"""From a trained model to one whose layers share: what the shared keys and values start from.

For a layer l that reads layer s, the least-squares start fits, for each pair of KV heads,

    v_l ~ v_s M           a matrix, folded into the reader's output projection
    k_l ~ alpha k_s       a complex number for each rotary pair, alpha = sum conj(k_s) k_l / sum
                          |k_s|^2; conj(alpha) is folded into the query projection

on keys before RoPE: a scaled rotation commutes with RoPE. Heads are matched by linear assignment on
the residuals, and query heads move with them. Nothing is added to the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import PreTrainedModel

from kvsmith.errors import explain
from kvsmith.hf import observe_kv

Start = Literal["keep_first", "average", "least_squares"]
RIDGE = 1e-4  # of the mean diagonal
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Observed:
    """Keys before RoPE and values of every layer of the unshared model.

    Attributes:
        k, v: for each layer [H, N, D] float32.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]


@dataclass(frozen=True)
class Fit:
    """How one layer's keys and values follow from another's.

    Attributes:
        head: [H] for each KV head of the reader the head of the owner.
        alpha: [H, D / 2] complex64, for the reader's heads.
        matrix: [H, D, D] float32, for the reader's heads.
        residual: relative squared error of keys plus that of values, mean over heads; 0 to 2.
    """

    head: tuple[int, ...]
    alpha: Tensor
    matrix: Tensor
    residual: float


@torch.no_grad()
def observe(model: PreTrainedModel, tokens: Tensor) -> Observed:
    """Run [B, T] tokens through an unshared model and keep its keys and values."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: int, k: Tensor, v: Tensor) -> None:
        seen[layer] = (
            k.transpose(0, 1).flatten(1, 2).float(),
            v.transpose(0, 1).flatten(1, 2).float(),
        )

    with observe_kv(model, keep):
        model(input_ids=tokens.to(model.device), use_cache=False)
    both = [seen[i] for i in sorted(seen)]
    return Observed(tuple(k for k, _ in both), tuple(v for _, v in both))


def fit_pair(seen: Observed, reader: int, owner: int) -> Fit:
    """Least squares of the reader's keys and values on the owner's; see the module.

    Args:
        seen: of the unshared model.
        reader, owner: layers.
    """
    keys, values = seen.k[reader], seen.v[reader]
    heads = range(keys.shape[0])
    fits = [[_fit_heads(seen, reader, owner, h, j) for j in heads] for h in heads]
    cost = [[fit[2] for fit in row] for row in fits]
    head = [int(j) for j in linear_sum_assignment(cost)[1]]
    chosen = [fits[h][head[h]] for h in heads]
    residual = sum(fit[2] for fit in chosen) / len(chosen)
    alpha, matrix = torch.stack([f[0] for f in chosen]), torch.stack([f[1] for f in chosen])
    assert matrix.shape == (len(values), values.shape[2], values.shape[2])
    return Fit(tuple(head), alpha, matrix, residual)


def _fit_heads(
    seen: Observed, reader: int, owner: int, h: int, j: int
) -> tuple[Tensor, Tensor, float]:
    k, k_own = _pairs(seen.k[reader][h]), _pairs(seen.k[owner][j])
    alpha = (k_own.conj() * k).sum(0) / k_own.abs().square().sum(0).clamp_min(1e-12)
    v, v_own = seen.v[reader][h], seen.v[owner][j]
    gram = v_own.T @ v_own
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + 1e-12)
    matrix = torch.linalg.solve(gram, v_own.T @ v)
    lost_k = (k - alpha * k_own).abs().square().sum() / k.abs().square().sum()
    lost_v = (v - v_own @ matrix).square().sum() / v.square().sum()
    return alpha, matrix, float(lost_k + lost_v)


def _pairs(x: Tensor) -> Tensor:
    """[..., D] as complex [..., D / 2]: channels d and d + D / 2 turn together."""
    first, second = x.chunk(2, dim=-1)
    return torch.complex(first.contiguous(), second.contiguous())


@torch.no_grad()
def convert(
    model: PreTrainedModel, owner: Sequence[int], start: Start, seen: Observed | None = None
) -> None:
    """Set the weights that a model starts from when its layers begin to share.

    Args:
        model: changed in place; its layers do not share yet.
        owner: for each layer the layer whose tokens it will read.
        start: `keep_first` leaves the owner's keys and values; `average` gives it the mean of its
            group's projections, with the gains of their norms; `least_squares` fits, see above.
        seen: for `least_squares`.

    Raises:
        ValueError: the architecture's projections cannot be folded.
    """
    if start == "keep_first":
        return
    attention = [module for module, _ in _layers(model)]
    if start == "average":
        _average(model, owner)
        return
    assert seen is not None
    for reader, own in enumerate(owner):
        if reader != own:
            _fold(attention[reader], fit_pair(seen, reader, own))


def _layers(model: PreTrainedModel) -> list[tuple[Any, Any]]:
    """Attention module and the norm before it, of every layer of a Llama-like model."""
    decoder: Any = model.get_decoder()
    found = [
        (getattr(layer, "self_attn", None), getattr(layer, "input_layernorm", None))
        for layer in getattr(decoder, "layers", [])
    ]
    plain = found and all(
        all(hasattr(a, n) for n in PROJECTIONS) and not hasattr(a, "q_norm") and norm is not None
        for a, norm in found
    )
    rotary = getattr(model.config.get_text_config(), "partial_rotary_factor", None) or 1.0
    if not plain or rotary != 1.0 or model.config.model_type in ("glm", "cohere", "cohere2"):
        where, remedy = f"model ({model.config.model_type})", "Use uptrain.start=keep_first."
        expected = "q, k, v, o with full half-split RoPE and no norm between"
        raise ValueError(explain(where, "attention", expected, "another", remedy))
    return found


def _average(model: PreTrainedModel, owner: Sequence[int]) -> None:
    layers = _layers(model)
    for own in sorted(set(owner)):
        group = [layers[layer] for layer, o in enumerate(owner) if o == own]
        for name in ("k_proj", "v_proj"):
            whole = [getattr(a, name).weight.float() * norm.weight.float() for a, norm in group]
            gain = group[0][1].weight.float()
            safe = torch.where(gain.abs() < 1e-6, torch.full_like(gain, 1e-6), gain)
            target = getattr(group[0][0], name)
            target.weight.copy_(torch.stack(whole).mean(0) / safe)
            if target.bias is not None:
                target.bias.copy_(torch.stack([getattr(a, name).bias for a, _ in group]).mean(0))


def _fold(attention: Any, fit: Fit) -> None:
    """Put a fit into the reader's q and o; query heads move to the KV head that they will read."""
    heads, dim = fit.alpha.shape[0], 2 * fit.alpha.shape[1]
    for part in (attention.q_proj.weight, attention.q_proj.bias):
        if part is None:
            continue
        rows = part.float().view(heads, -1, dim, part.shape[1] if part.dim() == 2 else 1)
        turned = _pairs(rows.transpose(2, 3)) * fit.alpha.conj()[:, None, None]
        turned = torch.cat([turned.real, turned.imag], -1).transpose(2, 3)
        moved = torch.empty_like(turned)
        moved[list(fit.head)] = turned
        part.copy_(moved.reshape(part.shape))
    weight = attention.o_proj.weight
    columns = weight.float().view(weight.shape[0], heads, -1, dim)
    mixed = torch.einsum("ohgd,hed->ohge", columns, fit.matrix)
    moved = torch.empty_like(mixed)
    moved[:, list(fit.head)] = mixed
    weight.copy_(moved.reshape(weight.shape))
