"""Projections of layers that read others: nothing reads their keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

UNREAD = ("k_proj", "v_proj", "k_norm")


def freeze_unread(model: PreTrainedModel, owner: Sequence[int]) -> None:
    """Leave the readers' key and value projections out of training.

    Args:
        model: any; families that project q, k and v at once keep training all of it.
        owner: for each layer the layer whose tokens it reads.
    """
    for part in _unread(model, owner):
        part.requires_grad_(False)


def skip_unread(model: PreTrainedModel, owner: Sequence[int]) -> None:
    """Leave out the readers' products with key and value projections: they give zeros.

    Args:
        model: its layers share.
        owner: for each layer the layer whose tokens it reads.
    """
    for part in _unread(model, owner):
        if isinstance(part, nn.Linear):
            setattr(part, "forward", _zeros(part.out_features))  # noqa: B010


def _unread(model: PreTrainedModel, owner: Sequence[int]) -> Iterator[Any]:
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if layer is None or owner[int(layer)] == int(layer):
            continue
        parts = (getattr(module, name, None) for name in UNREAD)
        yield from (part for part in parts if isinstance(part, nn.Module))


def _zeros(width: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], width)

    return forward
