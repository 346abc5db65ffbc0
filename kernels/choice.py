"""Which implementation of an operation runs where the caller does not say."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

from kvsmith.errors import explain

Impl = Literal["triton", "native", "reference"]
# Set to triton or reference to have it wherever it can run; "auto" or unset: triton on a GPU, on a
# CPU native where an operation has it.
VARIABLE = "KVSMITH_KERNELS"


def preferred(device: torch.device, native: bool = False) -> Impl:
    """The implementation that runs on a device if it supports the arguments.

    Args:
        device: where the tensors are.
        native: whether the operation has code of its own for CPUs.

    Raises:
        ValueError: the environment variable KVSMITH_KERNELS has an unknown value.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted == "triton":
        return "triton"
    if wanted == "reference":
        return "reference"
    if wanted != "auto":
        raise ValueError(explain("environment", VARIABLE, "auto, triton or reference", wanted))
    if device.type == "cuda" and has_triton():
        return "triton"
    return "native" if native and device.type == "cpu" else "reference"


@cache
def has_triton() -> bool:
    """Whether the triton package is installed; not every build of torch for GPUs brings it."""
    return find_spec("triton") is not None
