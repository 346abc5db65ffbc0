"""Ranks divided among layers: bytes go where a further feature leaves least error.

    error left = sum over layers of error_l * left_l(rank_l),   sum of bytes_l(rank_l) <= budget

`error_l` is a mean square in the residual stream, the same unit in every layer. Greedy: from the
smallest rank up, the step that saves most for its bytes comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def allot_ranks(
    left: Mapping[int, Mapping[int, float]],
    error: Mapping[int, float],
    cost: Mapping[int, float],
    mean_rank: int,
) -> tuple[int, ...]:
    """Choose a rank for each layer.

    Args:
        left: layer -> rank -> share of the error that is left.
        error: layer -> error under eviction alone.
        cost: layer -> bytes of a feature.
        mean_rank: the budget is what this rank costs everywhere.

    Returns:
        Ranks in the order of the layers.
    """
    budget = mean_rank * sum(cost[i] for i in left)
    chosen = {i: min(by) for i, by in left.items()}
    while steps := list(_steps(left, error, cost, chosen, budget)):
        _, layer, rank = max(steps)
        chosen[layer] = rank
    return tuple(chosen[i] for i in left)


def _steps(
    left: Mapping[int, Mapping[int, float]],
    error: Mapping[int, float],
    cost: Mapping[int, float],
    chosen: Mapping[int, int],
    budget: float,
) -> Sequence[tuple[float, int, int]]:
    """(saved for a byte, layer, rank) of every larger rank that is affordable and saves."""
    spent = sum(chosen[i] * cost[i] for i in left)
    found = []
    for i, by in left.items():
        for rank in sorted(r for r in by if r > chosen[i]):
            extra = (rank - chosen[i]) * cost[i]
            saved = error[i] * (by[chosen[i]] - by[rank])
            if spent + extra <= budget and saved > 0:
                found.append((saved / extra, -i, rank))
    return [(gain, -i, rank) for gain, i, rank in found]
