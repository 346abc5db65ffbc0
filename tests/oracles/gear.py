"""GEAR's coding of one block, derived again in numpy; imports nothing of ours.

Source: arXiv 2403.05527, version 4, section 3 and algorithm 2: X ~ D + S + L. S keeps the largest
and the smallest s/2 of every vector (a channel of the keys, a token of the values), D quantizes the
rest by groups, asymmetric between minimum and maximum with 2^b levels, and L is a power iteration
on what both leave, per head. Everything is float64. The published program fills the places of S
with the vector's mean, which can widen a group's range; the paper quantizes X - S, and here S is
left out of the range.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def outliers(vectors: Array, either: int) -> Mask:
    """The `either` largest and smallest of each row of [N, W]."""
    mask = np.zeros(vectors.shape, dtype=bool)
    for row, values in zip(mask, vectors, strict=True):
        order = np.argsort(values, kind="stable")
        row[order[:either]] = True
        row[order[len(order) - either :]] = True
    return mask


def quantize(rows: Array, mask: Mask, group: int, bits: int) -> tuple[Array, float]:
    """Decoded [N, W], each run of `group` with a range of its own; and how near to the middle
    between two levels the nearest element lies, in steps.
    """
    decoded, nearest = np.zeros_like(rows), 0.5
    for i, j in np.ndindex(rows.shape[0], rows.shape[1] // group):
        part = slice(j * group, (j + 1) * group)
        x, rest = rows[i, part], rows[i, part][~mask[i, part]]
        low, step = rest.min(), (rest.max() - rest.min()) / (2**bits - 1)
        code = (x - low) / step
        inside = code[~mask[i, part]]
        nearest = min(nearest, float(np.abs(inside - np.floor(inside) - 0.5).min()))
        decoded[i, part] = np.clip(np.round(code), 0, 2**bits - 1) * step + low
    return np.where(mask, rows, decoded), nearest


def keys(x: Array, either: int, group: int, bits: int) -> tuple[Array, float]:
    """D + S of keys [H, T, D]: vectors are channels, groups are `group` tokens of one."""
    heads, tokens, dim = x.shape
    rows = x.transpose(0, 2, 1).reshape(heads * dim, tokens)
    decoded, nearest = quantize(rows, outliers(rows, either), group, bits)
    return decoded.reshape(heads, dim, tokens).transpose(0, 2, 1), nearest


def values(x: Array, either: int, group: int, bits: int) -> tuple[Array, float]:
    """D + S of values [H, T, D]: vectors are tokens, groups are `group` neighbouring channels."""
    heads, tokens, dim = x.shape
    rows = x.transpose(1, 0, 2).reshape(tokens, heads * dim)
    decoded, nearest = quantize(rows, outliers(rows, either), group, bits)
    return decoded.reshape(tokens, heads, dim).transpose(1, 0, 2), nearest


def power_iteration(x: Array, b: Array, loops: int) -> Array:
    """L = A B^T of one head, algorithm 2: x [T, D], start b [D, R]."""
    a = np.zeros((x.shape[0], b.shape[1]))
    for loop in range(loops):
        last = loop == loops - 1
        if last:
            b = np.linalg.qr(b)[0]
        a = x @ b
        if last:
            a = np.linalg.qr(a)[0]
        b = x.T @ a
    return a @ b.T


def best(x: Array, rank: int) -> Array:
    """The closest matrix of that rank (Eckart and Young)."""
    u, s, v = np.linalg.svd(x, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]
