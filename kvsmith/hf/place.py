"""Where the layers of a model compute."""

from __future__ import annotations

import torch
from torch import nn

from kvsmith.errors import explain
from kvsmith.geometry import ModelGeometry
from kvsmith.hf.seam import attention_modules


def check_devices(model: nn.Module, shape: ModelGeometry) -> None:
    """Refuse a layer that reads the keys and values of a layer on another device.

    Raises:
        ValueError: names both layers.
    """
    devices = {int(m.layer_idx): device_of(m) for m in attention_modules(model)}  # type: ignore[arg-type]
    for layer, owner in enumerate(shape.owner):
        if devices.get(layer) != devices.get(owner):
            expected = f"{devices.get(owner)} as of layer {owner}, whose keys and values it reads"
            remedy = "Load the model to one device with model.device_map=null."
            where = f"layer {layer}"
            raise ValueError(explain(where, "device", expected, devices.get(layer), remedy))


def device_of(module: nn.Module) -> torch.device | None:
    """Where a module computes, also where accelerate keeps its weights elsewhere; None for one
    without weights.
    """
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        if (device := getattr(hook, "execution_device", None)) is not None:
            return torch.device(device)
    weight = next(module.parameters(), None)
    return None if weight is None else weight.device
