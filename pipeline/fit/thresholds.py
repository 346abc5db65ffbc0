"""Ranges of channels from their extremes."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsmith.pipeline.statistics.extremes import ChannelExtremes

# A constant channel has no width; this much of its value keeps the scale positive and the decoded
# value near.
LEAST_WIDTH = 2.0**-20


def channel_range(extremes: ChannelExtremes, fraction: float) -> tuple[Tensor, Tensor]:
    """The thresholds beyond which a value is an outlier.

    Args:
        extremes: of all calibration tokens.
        fraction: share of outliers, half at either end; 0 gives the smallest and largest value.

    Returns:
        (lower, upper): percentiles 100 fraction / 2 and 100 (1 - fraction / 2) of every channel,
        [C] float64.

    Raises:
        ValueError: more outliers than the statistics reach.
    """
    return extremes.percentiles(fraction / 2)


def affine(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The map that takes [lower, upper] to [-1, 1].

    Returns:
        (scale, zero): half width, positive, and centre; [C] float32.
    """
    scale, zero = (upper - lower) / 2, (upper + lower) / 2
    least = LEAST_WIDTH * zero.abs().clamp(min=LEAST_WIDTH)
    return torch.maximum(scale, least).float(), zero.float()
