"""RoPE of stored keys: position ids are kept (4 bytes a token for the whole model), cosines are
made when needed.

Keys are stored before RoPE. At attention time the model's own rotary module turns stored position
ids into cos and sin, and the model's own rotary function applies them, so half-split, interleaved,
partial, linear, llama3 and YaRN variants need no code here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

CosSin = tuple[torch.Tensor, torch.Tensor]
Rotate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Tokens whose cos and sin are kept during one forward pass, so that layers share them.
_MEMO_TOKENS = 4096


def rotation_function(attention: nn.Module) -> Rotate | None:
    """The rotary function of an attention module's own file as `(x [B, H, T, D], cos, sin) -> [B,
    H, T, D]`.

    Returns:
        None where the file has none (models without RoPE).
    """
    function = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if function is None:
        return None
    first = next(iter(inspect.signature(function).parameters))
    # Whether the module itself cuts the rotated channels out; known after the first call.
    slices: list[bool] = []

    def apply(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if first == "x":  # one tensor at a time
            turned = function(x, cos, sin, unsqueeze_dim=1)
        elif first == "tensor":  # GPT-J: [B, T, H, D], and sin before cos
            turned = function(x.transpose(1, 2), sin, cos).transpose(1, 2)
        else:  # query and key; an empty key costs nothing
            turned = function(x, x[:, :0], cos, sin)[0]
        assert isinstance(turned, torch.Tensor)
        return turned

    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        width = cos.shape[-1] * (2 if first == "tensor" else 1)
        if not slices:
            slices.append(width < x.shape[-1] and not _fits(apply, x, cos, sin))
        if not slices[0]:
            return apply(x, cos, sin)
        return torch.cat([apply(x[..., :width], cos, sin), x[..., width:]], dim=-1)

    return rotate


def _fits(apply: Rotate, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether the rotary function takes all channels: it splits them itself, or its cos is half as
    wide (GPT-OSS).
    """
    try:
        return apply(x[:, :1, :1], cos[:, :1], sin[:, :1]).shape[-1] == x.shape[-1]
    except RuntimeError:
        return False


@dataclass(frozen=True)
class RotarySource:
    """A rotary module and the arguments, besides positions, that it was called with (a layer type,
    say).
    """

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __call__(self, positions: torch.Tensor, dtype: torch.dtype) -> CosSin:
        """cos and sin [rows, T, width] of `positions` [rows, T] in `dtype`."""
        like = torch.empty((1, 1, 1), dtype=dtype, device=positions.device)
        # The class's forward: hooks that watch the module's own calls must not see this one.
        cos, sin = type(self.module).forward(
            self.module, like, positions, *self.args, **dict(self.kwargs)
        )
        return cos, sin


@dataclass(frozen=True)
class TableSource:
    """An attention module that keeps a table of [sin | cos] by position (GPT-J, CodeGen)."""

    module: nn.Module

    def __call__(self, positions: torch.Tensor, dtype: torch.dtype) -> CosSin:
        """cos and sin [rows, T, width / 2] of `positions` [rows, T] in `dtype`."""
        table = self.module.embed_positions
        assert isinstance(table, torch.Tensor)
        sin, cos = table.to(positions.device)[positions].to(dtype).chunk(2, dim=-1)
        return cos, sin


@dataclass
class Positions:
    """Position ids of the cached columns, in pages.

    Attributes:
        page_size: tokens of a page.
        length: columns held.
        pages: [rows, page_size] int32 each; one row where all batch rows agree.
    """

    page_size: int
    length: int = 0
    pages: list[torch.Tensor] = field(default_factory=list)
    _memo: dict[Any, CosSin] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return sum(p.nbytes for p in self.pages)

    def append(self, ids: torch.Tensor) -> None:
        """Add position ids [rows, T]."""
        if (
            ids.shape[0] > 1
            and bool((ids == ids[:1]).all())
            and (not self.pages or self.pages[0].shape[0] == 1)
        ):
            ids = ids[:1]
        if self.pages and self.pages[0].shape[0] != ids.shape[0]:
            rows = max(self.pages[0].shape[0], ids.shape[0])
            self.pages = [p.expand(rows, -1).contiguous() for p in self.pages]
            ids = ids.expand(rows, -1)
        done = 0
        while done < ids.shape[1]:
            offset = self.length % self.page_size
            if offset == 0:
                self.pages.append(
                    torch.zeros(
                        (ids.shape[0], self.page_size), dtype=torch.int32, device=ids.device
                    )
                )
            step = min(self.page_size - offset, ids.shape[1] - done)
            self.pages[-1][:, offset : offset + step] = ids[:, done : done + step]
            self.length += step
            done += step

    def crop(self, length: int) -> None:
        """Forget columns from `length` on."""
        self.length = min(self.length, length)
        del self.pages[-(-self.length // self.page_size) :]

    def map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a row selection or repetition; shared rows stay shared."""
        if self.pages and self.pages[0].shape[0] > 1:
            self.pages = [change(p) for p in self.pages]

    def window(self, start: int, stop: int) -> torch.Tensor:
        """[rows, stop - start] int64 position ids of a range of columns."""
        first, last = start // self.page_size, -(-stop // self.page_size)
        ids = torch.cat(self.pages[first:last], dim=1)
        return ids[:, start - first * self.page_size : stop - first * self.page_size].long()

    def cos_sin(
        self,
        source: RotarySource | TableSource,
        dtype: torch.dtype,
        start: int | None,
        stop: int,
        columns: torch.Tensor | None,
    ) -> CosSin:
        """cos and sin of columns start..stop-1, or of `columns` [B, C]."""
        if start is None:
            assert columns is not None
            ids = self.window(0, self.length)
            index = columns.clamp(max=self.length - 1)
            return source(ids.expand(index.shape[0], -1).gather(1, index), dtype)
        key = (source, dtype, start, stop)
        if key not in self._memo:
            made = source(self.window(start, stop), dtype)
            if sum(c.shape[1] for c, _ in self._memo.values()) + stop - start > _MEMO_TOKENS:
                return made
            self._memo[key] = made
        return self._memo[key]

    def end_pass(self) -> None:
        """Drop what the layers of one forward pass shared."""
        self._memo.clear()
