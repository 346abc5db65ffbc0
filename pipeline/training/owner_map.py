"""A map from measurement: which neighbours lose least when they are tied.

Every layer l and earlier layer s within reach is tied alone, by the joint start, and the held-out
loss is measured. The rises are taken to add up, and the map of consecutive groups with the smallest
sum is found exactly, by dynamic programming.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvsmith.errors import explain
from kvsmith.hf import share
from kvsmith.pipeline.training.convert import convert
from kvsmith.pipeline.training.fits import fit_pair, observe
from kvsmith.pipeline.training.heldout import heldout_loss


@dataclass(frozen=True)
class Measured:
    """A map with a number of owners, chosen by measurement.

    Attributes:
        owners: layers that keep their own.
        reach: largest group.
    """

    kind: Literal["measured"] = field(default="measured", kw_only=True)
    owners: int
    reach: int = 2


@dataclass(frozen=True)
class Tie:
    """What tying one pair of layers costs.

    Attributes:
        reader, owner: the layers.
        residual: relative squared error of keys plus that of values after least squares.
        rise: of the loss in nats, nothing else tied.
    """

    reader: int
    owner: int
    residual: float
    rise: float


def measure_ties(model: PreTrainedModel, tokens: Tensor, reach: int) -> list[Tie]:
    """Tie every pair within reach, alone, and measure.

    Args:
        model: unshared; unchanged.
        tokens: [B, T] int64; half of the rows fit, half measure.
        reach: largest group.
    """
    half = len(tokens) // 2
    seen = observe(model, tokens[:half])
    layers = len(seen.k)
    before = heldout_loss(model, tokens[half:])
    ties = []
    for reader in range(1, layers):
        for owner in range(max(0, reader - reach + 1), reader):
            own = [owner if layer == reader else layer for layer in range(layers)]
            with _unchanged(model):
                convert(model, own, "joint", seen)
                share(model, own)
                rise = heldout_loss(model, tokens[half:]) - before
            share(model, range(layers))
            ties.append(Tie(reader, owner, fit_pair(seen, reader, owner).residual, rise))
    return ties


@contextmanager
def _unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Weights of the attention are what they were afterwards."""
    kept = {n: w.detach().clone() for n, w in model.named_parameters() if "_proj" in n}
    yield
    with torch.no_grad():
        for name, weight in kept.items():
            model.get_parameter(name).copy_(weight)


def choose_map(ties: list[Tie], layers: int, owners: int) -> tuple[int, ...]:
    """The map with `owners` owners whose rises sum to least.

    Args:
        ties: of every pair within reach.
        layers: of the model.
        owners: wanted.

    Raises:
        ValueError: groups within reach cannot leave so few owners.
    """
    rise = {(t.reader, t.owner): t.rise for t in ties}

    # best[i, n]: least sum for the first i layers with n owners, and the map
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, ())}
    for end in range(1, layers + 1):
        for first in range(end):
            pairs = [(reader, first) for reader in range(first + 1, end)]
            cost = sum(rise.get(pair, math.inf) for pair in pairs)
            for n in range(1, end + 1):
                if (first, n - 1) not in best or cost == math.inf:
                    continue
                total, owner = best[first, n - 1]
                candidate = (total + cost, (*owner, *[first] * (end - first)))
                best[end, n] = min(best.get((end, n), candidate), candidate)
    if (layers, owners) not in best:
        least = min(n for end, n in best if end == layers)
        expected = f"between {least} and {layers}"
        raise ValueError(explain("cla.owners", "layers", expected, owners))
    return best[layers, owners][1]
