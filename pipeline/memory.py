"""Less memory for a backward pass: layers computed twice, their inputs on disk, smaller batches."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

SMALL = 2**20  # bytes of a tensor that is not worth a file
# Numbers that a layer of a Llama keeps for its backward pass, a token and channel: 12 of its width
# and 4 of the width inside the MLP, which is 2.7 to 4 times as wide.
KEPT = 24


@contextmanager
def recomputed(model: PreTrainedModel) -> Iterator[None]:
    """Layers called within keep only their input, and compute the rest again for their gradient."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:  # accelerate's
                layer.forward = forward


@contextmanager
def spilled(model: PreTrainedModel, folder: Path | None) -> Iterator[None]:
    """What autograd keeps of the forward pass within goes to unnamed files, if it is on the host.

    Args:
        model: its weights are left where they are.
        folder: on a disk with room; None changes nothing.
    """
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Any:
        known = tensor.untyped_storage().data_ptr() in weights
        if known or tensor.device.type != "cpu" or tensor.nbytes < SMALL:
            return tensor
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - autograd closes it
        file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return file, tensor.dtype, tensor.shape

    with saved_tensors_hooks(pack, _unpack):
        yield


def _unpack(kept: Tensor | tuple[BinaryIO, torch.dtype, torch.Size]) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    file, dtype, shape = kept
    file.seek(0)
    data = bytearray(file.read())
    file.close()
    return torch.frombuffer(data, dtype=dtype).view(shape)


def activation_bytes(model: PreTrainedModel, tokens: int) -> int:
    """About what the backward pass of so many tokens needs, if no layer is computed twice."""
    text = model.config.get_text_config(decoder=True)
    return int(tokens * text.num_hidden_layers * text.hidden_size * KEPT * model.dtype.itemsize)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left (torch tells the latter by its text)."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
