"""How keys and values of one layer follow from another's: observed, and fitted by least squares.

For a layer l that reads layer s, for each pair of KV heads,

    v_l ~ v_s M           a matrix, folded into the reader's output projection
    k_l ~ alpha k_s       a complex number for each rotary pair, alpha = sum conj(k_s) k_l / sum
                          |k_s|^2; conj(alpha) is folded into the query projection

on keys before RoPE: a scaled rotation commutes with RoPE. Heads are matched by linear assignment on
the residuals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvsmith.hf import observe_kv

RIDGE = 1e-4  # of the mean diagonal


@dataclass(frozen=True)
class Observed:
    """Keys before RoPE and values of every layer of the unshared model.

    Attributes:
        k, v: for each layer [H, N, D] float32.
        x: for each layer with a projection of its own for keys, what enters it [N, hidden] float32.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    x: dict[int, Tensor]


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
    inputs: dict[int, Tensor] = {}
    hooks = []
    for module in model.modules():
        layer, project = getattr(module, "layer_idx", None), getattr(module, "k_proj", None)
        if layer is not None and isinstance(project, nn.Module):
            hooks.append(project.register_forward_pre_hook(_keeper(inputs, int(layer))))

    def keep(layer: int, k: Tensor, v: Tensor) -> None:
        seen[layer] = (
            k.transpose(0, 1).flatten(1, 2).float(),
            v.transpose(0, 1).flatten(1, 2).float(),
        )

    with observe_kv(model, keep):
        model(input_ids=tokens.to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    both = [seen[i] for i in sorted(seen)]
    return Observed(tuple(k for k, _ in both), tuple(v for _, v in both), inputs)


def _keeper(inputs: dict[int, Tensor], layer: int) -> Callable[[nn.Module, Any], None]:
    def keep(_: nn.Module, args: Any) -> None:
        inputs[layer] = args[0].flatten(0, 1).float()

    return keep


def fit_pair(seen: Observed, reader: int, owner: int) -> Fit:
    """Least squares of the reader's keys and values on the owner's, see above.

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
    k, k_own = as_pairs(seen.k[reader][h]), as_pairs(seen.k[owner][j])
    alpha = (k_own.conj() * k).sum(0) / k_own.abs().square().sum(0).clamp_min(1e-12)
    v, v_own = seen.v[reader][h], seen.v[owner][j]
    gram = v_own.T @ v_own
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + 1e-12)
    matrix = torch.linalg.solve(gram, v_own.T @ v)
    lost_k = (k - alpha * k_own).abs().square().sum() / k.abs().square().sum()
    lost_v = (v - v_own @ matrix).square().sum() / v.square().sum()
    return alpha, matrix, float(lost_k + lost_v)


def as_pairs(x: Tensor) -> Tensor:
    """[..., D] as complex [..., D / 2]: channels d and d + D / 2 turn together."""
    first, second = x.chunk(2, dim=-1)
    return torch.complex(first.contiguous(), second.contiguous())
