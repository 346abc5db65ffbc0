"""Which implementation of an operation runs where the caller does not say."""

from __future__ import annotations

import os
from typing import Literal

import torch

from kvsmith.errors import explain

Impl = Literal["triton", "reference"]
# Set to one of the two to have it wherever it can run; "auto" or unset: triton on a GPU.
VARIABLE = "KVSMITH_KERNELS"


def preferred(device: torch.device) -> Impl:
    """The implementation that runs on a device if it supports the arguments.

    Args:
        device: where the tensors are.

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
    return "triton" if device.type == "cuda" else "reference"
