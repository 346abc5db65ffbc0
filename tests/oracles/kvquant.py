"""KVQuant's published calibration and coding, derived again in numpy; imports nothing of ours.

Source: arXiv 2401.18079, sections 3.1 to 3.4, and the order of operations of the authors'
quantizer: thresholds are percentiles (numpy's linear interpolation), values are shifted by the
centre and divided by the half width of the range, codes are the nearest centroid, outliers are
kept. Everything is float64 unless an input is float32.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def channel_range(x: NDArray, fraction: float) -> tuple[Array, Array]:
    """Per-channel thresholds: x [N, C] -> (lower, upper), [C]."""
    tail = 100 * fraction / 2
    return (
        np.percentile(x.astype(np.float64), tail, axis=0),
        np.percentile(x.astype(np.float64), 100 - tail, axis=0),
    )


def affine(lower: Array, upper: Array) -> tuple[Array, Array]:
    """(scale, zero): half width and centre."""
    return (upper - lower) / 2, (upper + lower) / 2


def token_outliers(x: NDArray, count: int) -> NDArray[np.bool_]:
    """Mask [N, W] of each token's extremes: half at either end, an odd one farther from the median.

    Walks one token at a time over its sorted order, which is slow and hard to get wrong.
    """
    mask = np.zeros(x.shape, dtype=bool)
    for row, values in zip(mask, x, strict=True):
        order = np.argsort(values, kind="stable")
        half = count // 2
        low, high = half, len(values) - half
        if count % 2:
            # The lower of the two middle values for an even width, as torch defines the median.
            median = values[order[(len(values) - 1) // 2]]
            if values[order[high - 1]] - median >= median - values[order[low]]:
                high -= 1
            else:
                low += 1
        row[order[:low]] = True
        row[order[high:]] = True
    return mask


def token_range(x: NDArray, mask: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Per-token (lower, upper) of what is not masked, [N]."""
    return (
        np.where(mask, np.inf, x.astype(np.float64)).min(axis=1),
        np.where(mask, -np.inf, x.astype(np.float64)).max(axis=1),
    )


def nearest(normal: Array, centroids: Array) -> NDArray[np.int64]:
    """Codes by comparing every value with every centroid; the lower one on a tie."""
    return np.abs(normal[..., None] - centroids).argmin(axis=-1)


def reconstruct(x: NDArray, scale: Array, zero: Array, centroids: Array, outlier: NDArray) -> Array:
    """Quantize and dequantize; outliers come back exact."""
    normal = (x - zero) / scale
    return np.where(outlier, x, centroids[nearest(normal, centroids)] * scale + zero)


def q_norm(normal: Array, centroids: Array) -> Array:
    """Centroids that give the quantized values mean and deviation of the originals."""
    quantized = centroids[nearest(normal, centroids)]
    ratio = normal.std() / quantized.std()
    return centroids * ratio + (normal.mean() - quantized.mean() * ratio)


def kmeans(values: NDArray, weights: NDArray | None, k: int) -> Array:
    """Centroids as the published code finds them, sorted."""
    from sklearn.cluster import KMeans

    model = KMeans(n_clusters=k, random_state=0, n_init="auto", max_iter=50)
    model.fit(values.reshape(-1, 1), sample_weight=None if weights is None else weights.ravel())
    return np.sort(model.cluster_centers_[:, 0].astype(np.float64))


def distortion(values: NDArray, weights: NDArray | None, centroids: Array) -> float:
    """Weighted mean squared distance to the nearest centroid."""
    error = (values.ravel() - centroids[nearest(values.ravel(), centroids)]) ** 2
    return float(np.average(error, weights=None if weights is None else weights.ravel()))
