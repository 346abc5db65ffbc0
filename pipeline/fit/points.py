"""Weighted points in [-1, 1] from the histograms of a layer."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvsmith.errors import explain
from kvsmith.pipeline.fit.thresholds import affine, channel_range
from kvsmith.pipeline.statistics.layer import LayerStatistics
from kvsmith.pipeline.statistics.plan import Need, TensorName, TokenView
from kvsmith.pipeline.statistics.token_histogram import TokenHistogram

Sensitivity = Literal["fisher", "fisher_scale", "none"]

GRID = 2048


def histogram_for(
    stats: LayerStatistics, tensor: TensorName, fraction: float, sensitivity: Sensitivity = "none"
) -> tuple[Tensor, Tensor]:
    """What a codebook was fitted to, for a plot: normalised values without outliers on an even
    grid.

    Args:
        stats: of one layer.
        tensor: "k" (normalised by channel) or "v" (by token).
        fraction: share of outliers left out.
        sensitivity: what the weights sum: "none" counts elements, "fisher" sums Fisher information,
            "fisher_scale" Fisher information times the squared half width of the range.

    Returns:
        (centres, weights): [2048] float64 each; centres increase from -1 to 1, weights sum to 1.

    Raises:
        ValueError: the statistics do not hold it.
    """
    need: Need = "channels" if tensor in stats.histograms else TokenView(fraction)
    points, weights = weighted_points(stats, tensor, need, fraction, sensitivity)
    cell = ((points + 1) * (GRID / 2)).long().clamp_(0, GRID - 1)
    sums = torch.bincount(cell, weights=weights, minlength=GRID)
    return (torch.arange(GRID, dtype=torch.float64) + 0.5) / (GRID / 2) - 1, sums / sums.sum()


def weighted_points(
    stats: LayerStatistics,
    tensor: TensorName,
    need: Need,
    fraction: float,
    sensitivity: Sensitivity,
) -> tuple[Tensor, Tensor]:
    """Normalised values without outliers, and their weights.

    Args:
        stats: of one layer.
        tensor: "k" or "v".
        need: which statistics; see `statistics.plan.needs`.
        fraction: share of outliers.
        sensitivity: see `histogram_for`.

    Returns:
        (points, weights), [M] float64 each.

    Raises:
        ValueError: the statistics were made without this view or without Fisher information.
    """
    if sensitivity != "none" and not stats.plan.fisher:
        remedy = "Use sensitivity=none, or calibrate with fisher=true."
        raise ValueError(
            explain(
                "sensitivity", "value", "none for statistics without Fisher", sensitivity, remedy
            )
        )
    if need == "channels":
        return _channel_points(stats, tensor, fraction, sensitivity)
    return TokenHistogram.points(), _token_sums(stats.view(tensor, need), sensitivity).cpu()


def _token_sums(view: TokenHistogram, sensitivity: Sensitivity) -> Tensor:
    sums = {"none": view.count, "fisher": view.fisher, "fisher_scale": view.fisher_scale}[
        sensitivity
    ]
    assert sums is not None
    return sums


def _channel_points(
    stats: LayerStatistics, tensor: TensorName, fraction: float, sensitivity: Sensitivity
) -> tuple[Tensor, Tensor]:
    """Bins of all channels, cut at the thresholds and mapped to [-1, 1]; a bin is its centre."""
    extremes, histogram = stats.channels(tensor)
    lower, upper = channel_range(extremes, fraction)
    scale, zero = (t.double()[:, None] for t in affine(lower, upper))
    start, width = histogram.bins()
    end = torch.minimum(start + width, histogram.maximum.double()[:, None])
    start = torch.maximum(start, histogram.minimum.double()[:, None])
    start, end = (start - zero) / scale, (end - zero) / scale
    inner_start, inner_end = start.clamp(-1, 1), end.clamp(-1, 1)
    # A bin of no width (a constant channel, or the maximum on a bin's edge) is inside as a whole
    # or not at all.
    inside = ((start + end).abs() <= 2 + 1e-6).double()
    share = torch.where(end > start, (inner_end - inner_start) / (end - start), inside)
    sums = histogram.count if sensitivity == "none" else histogram.fisher
    assert sums is not None
    weights = sums.double() * share.clamp(min=0)
    if sensitivity == "fisher_scale":
        weights = weights * scale**2
    held = weights > 0
    return ((inner_start + inner_end) / 2)[held].cpu(), weights[held].cpu()
