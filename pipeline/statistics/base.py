"""What every statistic is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from kvsmith.errors import explain


class Statistic(ABC):
    """A summary of tokens that can be fed, joined, stored and restored."""

    @abstractmethod
    def update(self, values: Tensor, fisher: Tensor | None = None) -> None:
        """Take tokens in.

        Args:
            values: [N, H, D] float32, finite; N tokens.
            fisher: [N, H, D] float32, squared gradient of the loss with respect to each value;
                None where the statistic was made without.
        """

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Take in what `other` has seen; `other` stays as it is."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Everything the statistic knows, as tensors on the CPU."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: a tensor is missing or has another shape or dtype.
        """


def take(state: Mapping[str, Tensor], name: str, like: Tensor, rows: bool = False) -> Tensor:
    """The tensor `name` of a state, copied to the device of `like` and checked against it.

    Args:
        state: tensors by name.
        name: which.
        like: has the dtype and shape that are wanted.
        rows: only the first dimension must agree.

    Raises:
        ValueError: it is missing or differs.
    """
    if name not in state:
        raise ValueError(
            explain("statistics", f"tensor {name!r}", "present", "nothing", "Calibrate again.")
        )
    tensor = state[name]
    length = 1 if rows else like.dim()
    if (
        tensor.dtype != like.dtype
        or tensor.dim() != like.dim()
        or tensor.shape[:length] != like.shape[:length]
    ):
        expected, got = (f"{t.dtype} {list(t.shape)}" for t in (like, tensor))
        raise ValueError(
            explain("statistics", f"tensor {name!r}", expected, got, "Calibrate again.")
        )
    return tensor.to(like.device, copy=True)


def scalar(value: int) -> Tensor:
    """An int64 tensor of shape [1]; safetensors of rank 0 are not read alike everywhere."""
    return torch.tensor([value], dtype=torch.int64)
