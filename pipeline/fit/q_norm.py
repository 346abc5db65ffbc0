"""Q-Norm: give decoded values the mean and deviation of the values they stand for."""

from __future__ import annotations

import torch
from torch import Tensor


def q_norm(points: Tensor, counts: Tensor, lut: Tensor, edges: Tensor) -> Tensor:
    """The codebook to decode with. Source: KVQuant v1 (arXiv:2401.18079v1), "Q-Norm".

    Args:
        points: [M] float64, normalised values without outliers.
        counts: [M] float64, elements at each point; not weighted by sensitivity.
        lut: [C] float32, fitted codebook.
        edges: [C - 1] float32, boundaries it is encoded with.

    Returns:
        [C] float32: `lut * s1 / s2 + m1 - m2 * s1 / s2` with mean m1 and deviation s1 of the
        points, m2 and s2 of what they are quantized to; `lut` itself where that has no deviation.
    """
    quantized = lut.double()[torch.bucketize(points, edges.double())]
    m1, s1 = _moments(points, counts)
    m2, s2 = _moments(quantized, counts)
    if s1 <= 0 or s2 <= 0:
        return lut
    return (lut.double() * (s1 / s2) + (m1 - m2 * s1 / s2)).float()


def _moments(values: Tensor, counts: Tensor) -> tuple[float, float]:
    mean = (values * counts).sum() / counts.sum()
    variance = ((values - mean) ** 2 * counts).sum() / counts.sum()
    return float(mean), float(variance.clamp(min=0).sqrt())
