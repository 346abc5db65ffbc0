"""One level for the keys and one for the values of every layer: an integer program, solved exactly.

    minimise   sum loss[i, s, c] x[i, s, c]
    such that  sum_c x[i, s, c] = 1,   sum bytes[i, s, c] x[i, s, c] <= budget,   x in {0, 1}
               sum_(c of w) x[i, k, c] = sum_(c of w) x[i, v, c]   for each dense window w

The loss of a choice is measured with everything else exact; that losses add up is an approximation,
good where each is small.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from kvsmith.errors import explain
from kvsmith.pipeline.budget.choices import Costs


@dataclass(frozen=True)
class Solution:
    """A choice.

    Attributes:
        picks: for each layer that owns tokens the level of its keys and of its values.
        nbytes: bytes of one row.
        loss: sum of the measured losses, nats a token.
    """

    picks: tuple[tuple[int, int], ...]
    nbytes: int
    loss: float


def solve(loss: Tensor, price: Costs, budget: int, where: str = "target_bits") -> Solution:
    """The choice with the smallest loss among those that fit.

    Args:
        loss: [layers, 2, levels] float64, not negative.
        price: bytes, of the same shape, and the window of each level.
        budget: bytes of one row, everything included.
        where: configuration path, for errors.

    Returns:
        The optimum; the same input gives the same choice.

    Raises:
        ValueError: not even the smallest choices fit; names their bytes.
    """
    room = budget - price.fixed
    if budget < smallest(price):
        expected = f"at least {smallest(price):,} bytes of cache, the smallest choice everywhere"
        raise ValueError(explain(where, "budget", expected, f"{budget:,} bytes"))
    count, sides, options = loss.shape
    weight = loss.double().numpy().reshape(-1)
    bytes_ = price.sides.double().numpy().reshape(-1)
    scale = max(float(bytes_.max()), 1.0)
    one = np.kron(np.eye(count * sides), np.ones((1, options)))
    rules = [
        LinearConstraint(one, 1, 1),
        LinearConstraint(bytes_[None] / scale, -np.inf, room / scale),
    ]
    if len(groups := price.groups()) > 1:
        member = np.array([[float(c in group) for c in range(options)] for group in groups])
        differ = np.concatenate([member, -member], axis=1)
        rules.append(LinearConstraint(np.kron(np.eye(count), differ), 0, 0))
    found = milp(
        weight / max(float(weight.max()), 1e-30),
        integrality=np.ones(weight.size),
        bounds=Bounds(0, 1),
        constraints=rules,
        options={"mip_rel_gap": 0.0},
    )
    assert found.x is not None, found.message
    chosen = np.asarray(found.x).reshape(count, sides, options).argmax(-1)
    picks = tuple((int(k), int(v)) for k, v in chosen)
    return priced(picks, loss, price)


def smallest(price: Costs) -> int:
    """Bytes of the smallest choice."""
    least = torch.stack([price.sides[..., group].amin(-1).sum(1) for group in price.groups()])
    return price.fixed + int(least.amin(0).sum())


def priced(picks: tuple[tuple[int, int], ...], loss: Tensor, price: Costs) -> Solution:
    """Bytes and loss of a choice."""
    cells = [(n, s, pair[s]) for n, pair in enumerate(picks) for s in (0, 1)]
    nbytes = price.fixed + sum(int(price.sides[c]) for c in cells)
    return Solution(picks, nbytes, sum(float(loss[c]) for c in cells))


def uniform(level: int, loss: Tensor, price: Costs) -> Solution:
    """The same level everywhere."""
    return priced(((level, level),) * loss.shape[0], loss, price)
