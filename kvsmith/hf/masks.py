"""Attention masks that are evaluated where they are needed."""

from __future__ import annotations

import inspect
from copy import copy
from functools import cached_property
from typing import Any

import torch
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sdpa_mask,
)

from kvsmith.fused import UNLIMITED


class LazyMask:
    """An attention mask that is evaluated window by window, so that [T, T] never exists for long
    prompts.

    It carries the arguments transformers made it with; `resolve` makes the mask of another
    implementation. Where layers lie on several devices, windows are made on the first one, where
    everything that the arguments hold lies, and go to the layer's.
    """

    where: torch.device | None = None

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        mask = arguments.get("attention_mask")
        local = arguments.get("local_size")
        self.padding: torch.Tensor | None = None
        holes = mask is not None and not bool(mask.all())
        if holes:
            assert mask is not None
            seen = mask.any(-1)
            self.padding = torch.where(seen, mask.to(torch.uint8).argmax(-1), mask.shape[-1])
        end = arguments.get("q_offset", 0) + arguments["q_length"]
        self.is_causal = (
            not holes
            and bool(arguments.get("allow_is_causal_skip", False))
            and (local is None or end <= local)
        )

    @cached_property
    def reach(self) -> int | None:
        """See `attention.Mask`."""
        found = _reach(self.arguments.get("mask_function", causal_mask_function))
        if found is None or self.padding is None:
            return found
        mask = self.arguments["attention_mask"]
        columns = torch.arange(mask.shape[-1], device=mask.device)
        left = columns >= self.padding.to(mask.device)[:, None]
        return found if torch.equal(mask.bool(), left) else None

    def window(self, rows: slice, columns: slice) -> torch.Tensor | None:
        """See `attention.Mask`."""
        a = self.arguments
        offset = a.get("q_offset", 0)
        if self.is_causal and columns.stop <= offset + rows.start + 1:
            return None
        made = {
            **a,
            "q_length": rows.stop - rows.start,
            "kv_length": columns.stop - columns.start,
            "q_offset": offset + rows.start,
            "kv_offset": columns.start,
            "allow_is_causal_skip": False,
        }
        return self._moved(sdpa_mask(**made))

    def __getitem__(self, index: tuple[slice, ...]) -> LazyMask:
        """The mask of some consecutive queries, as `mask[:, :, rows]` (Gemma 4 drops queries it
        does not need).
        """
        start, stop, step = index[2].indices(self.arguments["q_length"])
        assert step == 1 and index[:2] == (slice(None), slice(None))
        first = self.arguments.get("q_offset", 0) + start
        some = LazyMask({**self.arguments, "q_offset": first, "q_length": stop - start})
        return some if self.where is None else some.to(self.where)

    def resolve(self, implementation: str) -> Any:
        """The mask that another attention implementation expects."""
        return self._moved(ALL_MASK_ATTENTION_FUNCTIONS[implementation](**self.arguments))

    def to(self, device: torch.device | str | int, **_: Any) -> LazyMask:
        """The same for a layer on another device, as accelerate asks for it."""
        there = copy(self)
        there.where = torch.device(device)
        there.padding = None if self.padding is None else self.padding.to(there.where)
        return there

    def _moved(self, mask: Any) -> Any:
        return mask.to(self.where) if isinstance(mask, torch.Tensor) and self.where else mask


class TensorMask:
    """A ready 4-D mask, boolean or additive, in the form of `attention.Mask`."""

    padding = None
    is_causal = False
    reach = None

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2

    def window(self, rows: slice, columns: slice) -> torch.Tensor | None:
        """See `attention.Mask`."""
        return self.mask[:, :, rows, columns]


class BiasMask:
    """A ready 4-D mask of numbers for the logits, in the form of `attention.Mask`.

    Only differences within a row matter. The largest becomes 0, so that ALiBi counts from the query
    and a state's weight does not depend on how long the text is.
    """

    padding = None
    is_causal = False
    reach = None

    def __init__(self, mask: torch.Tensor) -> None:
        bias = mask.float().masked_fill(mask <= torch.finfo(mask.dtype).min / 2, float("-inf"))
        largest = bias.amax(-1, keepdim=True)
        self.mask = bias - largest.masked_fill(largest.isneginf(), 0.0)

    def window(self, rows: slice, columns: slice) -> torch.Tensor | None:
        """[B, Hq, rows, columns] float32, -inf where nothing is seen; see `attention.Mask`."""
        return self.mask[:, :, rows, columns]


def _reach(function: Any) -> int | None:
    """Columns that a query sees back by a mask function of transformers that is causal, or causal
    and a sliding window; None for any other.
    """
    if function is causal_mask_function:
        return UNLIMITED
    if getattr(function, "__qualname__", "") != "and_masks.<locals>.and_mask":
        return None
    parts = inspect.getclosurevars(function).nonlocals["mask_functions"]
    reach = UNLIMITED
    for part in parts:
        if getattr(part, "__qualname__", "") == "sliding_window_overlay.<locals>.inner_mask":
            reach = min(reach, inspect.getclosurevars(part).nonlocals["sliding_window"])
        elif part is not causal_mask_function:
            return None
    return reach if causal_mask_function in parts else None


def make_mask(**arguments: Any) -> LazyMask:
    return LazyMask(arguments)
