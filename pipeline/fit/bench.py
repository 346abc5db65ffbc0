"""`python -m kvsmith.pipeline.fit.bench`: CPU seconds and objective of our one-dimensional k-means
beside scikit-learn's.

Both run on one thread and get the same float32 values and weights: normalised values as a codebook
is fitted to (Student t with 5 degrees of freedom without its outer 1 %) and Fisher-like weights.
scikit-learn is called as the published KVQuant code calls it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

# Before numpy and torch load: their thread pools read it once.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from kvsmith.pipeline.fit.kmeans import fit_codebook, objective
from kvsmith.pipeline.log import Run

LIMIT = 2.015  # half of a Student t5 law's 1 % lies beyond +-4.03; the unit here is half of that


def sample(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Values in [-1, 1] and weights of a heavy-tailed law, [n] float32 each."""
    generator = torch.Generator().manual_seed(seed)
    chi = sum(torch.randn(n, generator=generator) ** 2 for _ in range(5))
    assert isinstance(chi, Tensor)
    values = torch.randn(n, generator=generator) / (chi / 5).sqrt_() / (2 * LIMIT)
    values = torch.where(values.abs() <= 1, values, 2 * torch.rand(n, generator=generator) - 1)
    weights = (
        torch.randn(n, generator=generator).mul_(2).exp_()
        * torch.randn(n, generator=generator) ** 2
    )
    return values, weights


def sklearn_codebook(values: Tensor, weights: Tensor, k: int) -> Tensor:
    """Cluster centres as the published code finds them, [k] float32 sorted."""
    model = KMeans(k, random_state=0, n_init="auto", max_iter=50)
    model.fit(values.numpy()[:, None], sample_weight=weights.numpy())
    return torch.from_numpy(model.cluster_centers_[:, 0]).float().sort().values


def cpu_seconds(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Process time of a call, and its result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def main() -> None:
    """Measure, and write one line for each k."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, default=1 << 24, help="number of values")
    parser.add_argument("--k", type=int, nargs="+", default=[16], help="codebook sizes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    values, weights = sample(arguments.values)
    rows = []
    warm = values[:100_000], weights[:100_000]  # neither side pays for loading libraries
    fit_codebook(*warm, 4)
    sklearn_codebook(*warm, 4)
    for k in arguments.k:
        ours, lut = cpu_seconds(lambda k=k: fit_codebook(values, weights, k))  # type: ignore[misc]
        theirs, reference = cpu_seconds(lambda k=k: sklearn_codebook(values, weights, k))  # type: ignore[misc]
        ratio = objective(values, weights, lut) / objective(values, weights, reference)
        rows.append([k, f"{ours:.3f}", f"{theirs:.2f}", f"{theirs / ours:.0f}x", f"{ratio:.5f}"])
    columns = ["k", "ours, CPU s", "scikit-learn, CPU s", "less CPU", "objective / scikit-learn's"]
    Run(None).table(f"weighted k-means of {arguments.values:,} float32 values", columns, rows)


if __name__ == "__main__":
    main()
