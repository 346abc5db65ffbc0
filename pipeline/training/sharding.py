"""Weights, gradients and moments spread over the processes (FSDP2), and put together again.

A forward pass without a backward pass leaves weights together; `spread_again` undoes that, so that
parameters are those that the optimizer knows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


def shard(model: PreTrainedModel, processes: int, keep: bool = False) -> None:
    """Spread a model over all processes, which all call this with the same weights.

    Args:
        model: changed in place; its parameters become DTensors.
        processes: how many there are.
        keep: weights stay together from the forward to the backward pass: more memory, less sent.
    """
    mesh = init_device_mesh(model.device.type, (processes,))
    decoder: Any = model.get_decoder()
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=not keep)
    fully_shard(model, mesh=mesh)


def spread_again(model: PreTrainedModel) -> None:
    """Let go of weights that a forward pass alone has put together."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together; all processes call this."""
    if isinstance(tensor, DTensor):
        full: Tensor = tensor.full_tensor()
        return full
    return tensor


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, spread and placed as another one is."""
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements)
    return tensor


@torch.no_grad()
def gathered(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or where it is spread a whole copy on the CPU; all processes call this."""
    if not any(isinstance(weight, DTensor) for weight in model.parameters()):
        return model
    weights = {name: whole(weight).cpu() for name, weight in model.named_parameters()}
    copy: PreTrainedModel = AutoModelForCausalLM.from_config(model.config)
    copy.load_state_dict(weights, strict=False)  # tied weights have one name
    copy.tie_weights()
    return copy
