"""The largest magnitudes that a plain cache would store, after RoPE, of every head.

Statistics of calibration look at keys before RoPE. Engines that cache in 8-bit floats store rotated
keys, and their largest magnitude does not follow from channel ranges (these bound it only up to a
factor of sqrt(2), and leave the sinks out). So a forward pass over the same tokens looks at what
reaches a cache; it takes no gradient and keeps nothing but two numbers a head.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvsmith.errors import explain
from kvsmith.pipeline.calibration.record import RECORD, Record
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.model import input_device
from kvsmith.pipeline.stage import Stage, read_safetensors, run_stage, write_safetensors

AMAX = "amax.safetensors"
VERSION = 1  # raised when the same tokens give other numbers
WORDS = {"k": "keys", "v": "values"}


class AmaxCache(DynamicCache):  # type: ignore[misc]
    """A cache of one batch that notes the magnitudes of what it is given.

    Attributes:
        amax: `layers.{i}.k` and `layers.{i}.v` -> [H] float32, over all batches so far; given from
            outside, since every batch has a cache of its own.
    """

    def __init__(self, amax: dict[str, Tensor], config: Any) -> None:
        super().__init__(config=config)
        self.amax = amax

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        for part, x in (("k", key_states), ("v", value_states)):
            name = f"layers.{layer_idx}.{part}"
            new = x.detach().abs().amax(dim=(0, 2, 3)).float().cpu()  # NaN stays NaN
            if not new.isfinite().all():
                where, what = f"layer {layer_idx}", f"{WORDS[part]} ({part})"
                remedy = "Check the model's weights, or load it with model.dtype=float32."
                raise ValueError(explain(where, what, "finite", "NaN or infinity", remedy))
            self.amax[name] = torch.maximum(self.amax.get(name, new), new)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.no_grad()
def collect_amax(
    model: PreTrainedModel, tokens: Tensor, batch_size: int, log: Run | None = None
) -> dict[str, Tensor]:
    """Magnitudes over all tokens, the first of each sequence among them.

    Args:
        model: in evaluation mode.
        tokens: [samples, length] int64.
        batch_size: sequences a forward pass.
        log: tells the progress.

    Returns:
        `layers.{i}.k` and `layers.{i}.v` -> [H] float32, for each layer that stores tokens.

    Raises:
        ValueError: keys or values that are not finite; names the layer.
    """
    amax: dict[str, Tensor] = {}
    batches, decoder = tokens.split(batch_size), model.get_decoder()

    def one(batch: Tensor) -> None:
        cache = AmaxCache(amax, model.config)
        decoder(input_ids=batch.to(input_device(model)), past_key_values=cache, use_cache=True)

    if log is None:
        for batch in batches:
            one(batch)
        return amax
    with log.progress(len(batches), "amax") as bar:
        for batch in batches:
            one(batch)
            bar.advance()
    return amax


def amax_of(
    folder: Path, record: Record, load: Callable[[], tuple[PreTrainedModel, Tensor]], log: Run
) -> dict[str, Tensor]:
    """Magnitudes of a calibration; the pass is run once and its result kept in the folder.

    Args:
        folder: of the calibration.
        record: its record.
        load: gives the model and the calibration's tokens; called only where they are needed.
        log: tells the progress.
    """

    def run() -> None:
        model, tokens = load()
        amax = collect_amax(model, tokens, record.source.batch_size, log)
        write_safetensors(folder / AMAX, amax)

    stage = Stage("amax", (folder / RECORD,), (AMAX,), run, {"version": VERSION})
    run_stage(stage, folder)
    return read_safetensors(folder / AMAX)
