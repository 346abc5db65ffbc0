"""Weighted k-means on a line: near-optimal, deterministic, and in one pass over the values.

Three steps. Values are summed into bins (65536 of them, or one for each distinct value where there
are fewer). Dynamic programming finds the best partition of these bins into k cells, with
boundaries allowed at 512 places that are dense where values are. Lloyd's iteration on the bins
then moves each boundary to where it is best. scikit-learn's KMeans starts from a random draw and
ends in the local optimum next to it; here the start is the best one up to these places.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvsmith.errors import explain

BINS = 65536
PLACES = 512
CHUNK = 1 << 18  # values at a time: the working set stays in the cache
ITERATIONS = 1000

Array = NDArray[np.float64]


def fit_codebook(values: Tensor, weights: Tensor | None, k: int) -> Tensor:
    """The k levels that minimise the weighted squared distance of values to their nearest level.

    With fewer distinct values than k the levels are these values, and further ones halve the
    widest gaps between them, so that k different levels come out and the error is zero all the
    same.

    Args:
        values: any shape, float, finite.
        weights: shape of values, >= 0, some > 0; None counts every value alike.
        k: number of levels, at least 1.

    Returns:
        [k] float32, strictly increasing.

    Raises:
        ValueError: no values, a value or weight that is not finite, or no positive weight.
    """
    if k < 1:
        raise ValueError(explain("fit_codebook", "k", "at least 1", k))
    points, sums = _binned(values.flatten(), None if weights is None else weights.flatten())
    levels = _solve(points, sums, k) if len(points) > k else points
    return _increasing(levels, k)


def objective(values: Tensor, weights: Tensor | None, levels: Tensor) -> float:
    """The weighted mean squared distance of values to their nearest level, in float64."""
    levels = levels.double().sort().values
    values = values.flatten().double()
    nearest = levels[torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)]
    w = torch.ones_like(values) if weights is None else weights.flatten().double()
    return float(((values - nearest) ** 2 * w).sum() / w.sum())


def _binned(values: Tensor, weights: Tensor | None) -> tuple[Array, Array]:
    """Points in increasing order, each the mean of its bin, and their positive weights."""
    _check(values, weights)
    if len(values) <= BINS:
        w = np.ones(len(values)) if weights is None else weights.double().cpu().numpy()
        points, place = np.unique(values.double().cpu().numpy(), return_inverse=True)
        sums: Array = np.bincount(place, w, len(points)).astype(np.float64)
    else:
        sums, moments = _histogram(values, weights)
        points = np.maximum.accumulate(
            np.where(sums > 0, moments / np.where(sums > 0, sums, 1.0), -np.inf)
        )
    return points[sums > 0], sums[sums > 0]


def _histogram(values: Tensor, weights: Tensor | None) -> tuple[Array, Array]:
    """Sums of weights, and of weights times values, in equal bins over the range."""
    low, high = (float(x) for x in torch.aminmax(values))
    step = BINS / max(high - low, float(np.finfo(np.float32).tiny))
    sums, moments = torch.zeros(2, BINS, dtype=torch.float64, device=values.device)
    for start in range(0, len(values), CHUNK):
        chunk = values[start : start + CHUNK].float()
        place = ((chunk - low) * step).to(torch.int32).clamp_(0, BINS - 1)
        w = None if weights is None else weights[start : start + CHUNK].float()
        sums += torch.bincount(place, weights=w, minlength=BINS)
        moments += torch.bincount(place, weights=chunk if w is None else chunk * w, minlength=BINS)
    return sums.cpu().numpy(), moments.cpu().numpy()


def _check(values: Tensor, weights: Tensor | None) -> None:
    where = "fit_codebook"
    if values.numel() == 0:
        raise ValueError(explain(where, "values", "at least one", "none"))
    for name, tensor in (("values", values), ("weights", weights)):
        if tensor is not None and not np.isfinite([float(x) for x in torch.aminmax(tensor)]).all():
            raise ValueError(explain(where, name, "finite", "NaN or infinity"))
    if weights is not None and (
        weights.shape != values.shape or float(weights.min()) < 0 or float(weights.max()) <= 0
    ):
        raise ValueError(
            explain(where, "weights", "one per value, none negative and some positive", "others")
        )


def _solve(points: Array, sums: Array, k: int) -> Array:
    """Levels for more points than levels."""
    centre = float((points * sums).sum() / sums.sum())
    points = points - centre  # differences of squared moments keep their digits
    weight = np.concatenate([[0.0], np.cumsum(sums)])
    moment = np.concatenate([[0.0], np.cumsum(sums * points)])
    places = _places(points, sums)
    cuts = places[_partition(weight[places], moment[places], k)]
    levels = np.diff(moment[cuts]) / np.diff(weight[cuts])
    for _ in range(ITERATIONS):
        cuts[1:-1] = np.searchsorted(points, (levels[1:] + levels[:-1]) / 2, side="right")
        held = np.diff(weight[cuts])
        moved = np.where(held > 0, np.diff(moment[cuts]) / np.where(held > 0, held, 1.0), levels)
        if np.array_equal(moved, levels):
            break
        levels = moved
    return levels + centre


def _places(points: Array, sums: Array) -> NDArray[np.int64]:
    """Indices between points where a cell may end, about 512, the two ends among them.

    Equal steps of the integral of density^(1/3), which is how the levels of a fine quantizer are
    spread.
    """
    n = len(points)
    if n <= PLACES:
        return np.arange(n + 1)
    width = np.diff(points, prepend=2 * points[0] - points[1])
    mass = np.cumsum(np.cbrt(sums * width**2))  # (sums / width)^(1/3) * width
    inner = np.searchsorted(mass, np.arange(1, PLACES) * (mass[-1] / PLACES))
    even = np.arange(0, n + 1, max(1, n // 64))
    return np.unique(np.concatenate([[0, n], inner, even]))


def _partition(weight: Array, moment: Array, k: int) -> NDArray[np.int64]:
    """The best k cells between places: indices of their k + 1 ends.

    Args:
        weight, moment: sums of weights, and of weights times points, before each place.
        k: fewer than places.
    """
    held = weight[None, :] - weight[:, None]
    valid = np.triu(np.ones(held.shape, dtype=bool), 1)
    # Up to a constant, the error of a cell is minus moment^2 / weight.
    gain = np.full(held.shape, -np.inf)
    np.divide((moment[None, :] - moment[:, None]) ** 2, held, out=gain, where=valid & (held > 0))
    best, back = gain[0], []
    for _ in range(k - 1):
        total = best[:, None] + gain
        choice = total.argmax(0)
        best = np.take_along_axis(total, choice[None], 0)[0]
        back.append(choice)
    ends = [len(weight) - 1]
    for choice in reversed(back):
        ends.append(int(choice[ends[-1]]))
    return np.array([0, *reversed(ends)])


def _increasing(levels: Array, k: int) -> Tensor:
    """k strictly increasing float32 levels."""
    found = np.unique(levels.astype(np.float32))
    up = np.float32(np.inf)
    while len(found) < k:
        gaps = np.diff(found.astype(np.float64), append=found[-1])
        widest = int(gaps.argmax())
        new = np.float32(found[widest] + gaps[widest] / 2)
        if new in found:  # one value, or neighbours among the float32
            new = np.nextafter(found[-1] + np.float32(len(found) == 1), up)
        found = np.unique(np.append(found, new))
    return torch.from_numpy(found)
