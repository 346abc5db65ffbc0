"""Rotations from what a model looks for: eigenvectors of its queries' covariance, then Hadamard's.

An error e of a key changes the logit of a query q by q e, so directions in which queries are large
are those in which errors count; of values the same holds for what attention gives out. With U the
eigenvectors of E[x x^T] of a KV head (queries of its group after RoPE; outputs of attention) the
rotation is U H: every stored channel then carries an equal share of every direction. One forward
pass over the calibration's tokens, without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvsmith.codec import hadamard
from kvsmith.errors import explain
from kvsmith.hf import geometry
from kvsmith.pipeline.calibration.record import RECORD, Record
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.model import input_device
from kvsmith.pipeline.stage import Stage, read_safetensors, run_stage, write_safetensors

BASES = "bases.safetensors"
NAME = "kvsmith-observed-sdpa"
VERSION = 1  # raised when the same tokens give other rotations


@torch.no_grad()
def collect_bases(
    model: PreTrainedModel, tokens: Tensor, batch_size: int, log: Run
) -> dict[str, Tensor]:
    """Rotations of every layer that stores tokens.

    Args:
        model: in evaluation mode.
        tokens: [samples, length] int64.
        batch_size: sequences a forward pass.
        log: tells the progress.

    Returns:
        `layers.{i}.{k,v}.rotation` -> [H, D, D] float32, orthogonal; channels as rows times it.

    Raises:
        ValueError: the model's attention cannot be watched.
    """
    shape, sums = geometry(model.config), dict[str, Tensor]()

    def see(layer: int, query: Tensor, output: Tensor) -> None:
        owner = shape.owner[layer]
        heads = shape.layers[owner].kv_heads
        for part, x in (("k", query), ("v", output)):
            name = f"layers.{owner}.{part}.rotation"
            rows = x.double().unflatten(1, (heads, -1)).flatten(2, 3)  # [B, H, G * T, D]
            sums[name] = sums.get(name, 0) + torch.einsum("bhtd,bhte->hde", rows, rows).cpu()

    batches, decoder = tokens.split(batch_size), model.get_decoder()
    with observed(model, see), log.progress(len(batches), "bases") as bar:
        for batch in batches:
            decoder(input_ids=batch.to(input_device(model)), use_cache=False)
            bar.advance()
    missing = [i for i in shape.owners if f"layers.{i}.k.rotation" not in sums]
    if missing:
        expected = "called through transformers' attention interface"
        raise ValueError(explain(f"layer {missing[0]}", "attention", expected, "its own way"))
    return {name: _turn(total) for name, total in sorted(sums.items())}


def _turn(total: Tensor) -> Tensor:
    """U H of [H, D, D] sums of squares; the signs of eigenvectors are fixed, so that it repeats."""
    vectors = torch.linalg.eigh(total)[1].flip(-1)
    largest = vectors.abs().argmax(-2, keepdim=True)
    vectors = vectors * vectors.gather(-2, largest).sign()
    return (vectors @ hadamard(total.shape[-1]).double()).float().contiguous()


@contextmanager
def observed(model: PreTrainedModel, see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Show queries and outputs of attention, both [B, heads, T, D], with the layer's index."""

    def attend(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, weights = sdpa_attention_forward(module, query, *args, **kwargs)
        see(module.layer_idx, query, output.transpose(1, 2))
        return output, weights

    before = model.config._attn_implementation
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def bases_of(
    folder: Path, record: Record, load: Callable[[], tuple[PreTrainedModel, Tensor]], log: Run
) -> dict[str, Tensor]:
    """Rotations of a calibration; the pass is run once and its result kept in the folder.

    Args:
        folder: of the calibration.
        record: its record.
        load: gives the model and the calibration's tokens; called only where they are needed.
        log: tells the progress.
    """

    def run() -> None:
        model, tokens = load()
        write_safetensors(
            folder / BASES, collect_bases(model, tokens, record.source.batch_size, log)
        )

    stage = Stage("bases", (folder / RECORD,), (BASES,), run, {"version": VERSION})
    run_stage(stage, folder)
    return read_safetensors(folder / BASES)
