"""The joint start: one projection that serves all layers of a group at once.

Least squares of a reader on its owner's keys and values takes those as they are. Here they are
chosen too: from the owner's input x a projection W, and for each layer l of the group a fold,

    v_l ~ x W M_l         reduced-rank regression: the leading directions of what x predicts
    k_l ~ alpha_l (x w)   the same with complex numbers, for each rotary pair

Source: reduced-rank regression (Izenman 1975), for shared keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvsmith.pipeline.training.fits import RIDGE, Fit, Observed, as_pairs, fit_pair


def fit_group(
    seen: Observed, members: Sequence[int], bias: bool
) -> tuple[Tensor, Tensor, list[Fit]]:
    """Fit one owner's projections and its group's folds.

    Args:
        seen: of the unshared model.
        members: layers of the group, the owner first.
        bias: whether the projections have one.

    Returns:
        Weights [H * D, hidden] of keys and of values, with a column for the bias last if there is
        one; and a fold of each member.
    """
    owner = members[0]
    x = seen.x[owner]
    if bias:
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    gram = x.T @ x
    ridge = gram.clone()
    ridge.diagonal().add_(RIDGE * gram.diagonal().mean() + 1e-12)
    factor = torch.linalg.cholesky(ridge)
    count = len(seen.k[owner])
    heads = [tuple(range(count)), *(fit_pair(seen, m, owner).head for m in members[1:])]
    keys, values, folds = [], [], []
    for j in range(count):
        mine = [(layer, head.index(j)) for layer, head in zip(members, heads, strict=True)]
        k, v = (torch.cat([part[i][h] for i, h in mine], 1) for part in (seen.k, seen.v))
        from_x = [torch.cholesky_solve(x.T @ y, factor) for y in (k, v)]
        key, alpha = _keys(from_x[0], gram, len(members))
        value, matrix = _values(from_x[1], gram, len(members))
        keys.append(key)
        values.append(value)
        folds.append((alpha, matrix))
    fits = []
    for place, head in enumerate(heads):
        alpha = torch.stack([folds[j][0][place] for j in head])
        matrix = torch.stack([folds[j][1][place] for j in head])
        fits.append(Fit(head, alpha, matrix, 0.0))
    return torch.cat(keys), torch.cat(values), fits


def _values(weight: Tensor, gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[D, hidden] projection and [count, D, D] folds from what x predicts, [hidden, count * D]."""
    dim = weight.shape[1] // count
    _, vectors = torch.linalg.eigh(weight.T @ gram @ weight)
    lead = vectors[:, -dim:]
    scale = count**0.5
    return (weight @ lead).T / scale, lead.T.unflatten(1, (count, dim)).transpose(0, 1) * scale


def _keys(weight: Tensor, gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[D, hidden] projection and [count, D / 2] complex folds."""
    pairs = as_pairs(weight.unflatten(1, (count, -1)))  # [hidden, count, D / 2]
    moved = pairs.permute(2, 0, 1)
    inner = moved.mH @ (gram.to(moved.dtype) @ moved)  # [D / 2, count, count]
    _, vectors = torch.linalg.eigh(inner)
    lead = vectors[..., -1]  # [D / 2, count]
    scale = count**0.5
    made = torch.einsum("pnc,pc->pn", moved, lead) / scale
    return torch.cat([made.real, made.imag]), lead.conj().T * scale
