"""What each choice does to the model's predictions, all else exact, through the real cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvsmith.hf import make_cache
from kvsmith.pipeline.budget.choices import SIDES, Levels, Parameters
from kvsmith.pipeline.evaluation.candidate import FULL
from kvsmith.pipeline.evaluation.forced import losses, reference
from kvsmith.spec import CacheSpec


class Meter:
    """Divergence of caches from full precision on fixed windows; see `evaluation.forced`.

    Args:
        model: in evaluation mode.
        windows: [n, T] int64.
        prefill, chunk: tokens of the first and of every later forward pass.
        batch: windows side by side.
    """

    def __init__(
        self, model: PreTrainedModel, windows: Tensor, prefill: int, chunk: int, batch: int
    ) -> None:
        self._model, self._prefill, self._chunk = model, prefill, chunk
        self._parts = [
            (ids, reference(model, FULL.cache(model), ids, prefill, chunk))
            for ids in windows.to(model.device).split(batch)
        ]

    def kld(self, spec: CacheSpec, parameters: Parameters) -> Tensor:
        """Mean divergence of each window, nats a token, [n] float64."""
        found = []
        for ids, full in self._parts:
            cache = make_cache(self._model, spec, parameters)
            lost = losses(self._model, cache, ids, full, self._prefill, self._chunk)
            found.append(lost.kld.double().mean(1))
        return torch.cat(found)


def measure_layer(
    meter: Meter,
    options: Levels,
    fitted: Sequence[Parameters],
    layer: int,
    advance: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Loss of every level of one layer's keys and values.

    Args:
        meter: measures.
        options, fitted: the levels and their parameters.
        layer: index of a layer that owns tokens.
        advance: called after each measurement.

    Returns:
        [2, levels] mean divergence, nats a token.
    """
    found: list[list[float]] = []
    for name in SIDES:
        row = []
        for level in range(len(options)):
            spec = CacheSpec(options.alone(layer, name, level))
            row.append(float(meter.kld(spec, fitted[level]).mean()))
            advance()
        found.append(row)
    return found
