"""RoPE of stored keys: position ids are kept (4 bytes a token for the whole model), cosines are
made when needed.

Keys are stored before RoPE. At attention time the model's own rotary module turns stored position
ids into cos and sin, and the model's own rotary function applies them, or has told which channels
it turns (`kvsmith.pairing`), so half-split, interleaved, partial, linear, llama3 and YaRN variants
need no code here. Dynamic and LongRoPE modules change their frequencies as a text grows; a token
keeps those of the step that stored it, as it does in a cache of rotated keys.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

CosSin = tuple[torch.Tensor, torch.Tensor]
Rotate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# By rotary module, what it rotates with: inverse frequencies and the scale of cos and sin.
Frequencies = dict[nn.Module, dict[str, Any]]

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
    """Whether the rotary function takes all channels: it splits them, or cos is half as wide."""
    try:
        return apply(x[:, :1, :1], cos[:, :1], sin[:, :1]).shape[-1] == x.shape[-1]
    except RuntimeError:
        return False


def changes_frequencies(module: nn.Module) -> bool:
    """Whether a rotary module's frequencies depend on the length of the text."""
    kinds = getattr(module, "rope_type", None)
    names = kinds.values() if isinstance(kinds, Mapping) else [kinds]
    return any(name == "longrope" or "dynamic" in str(name) for name in names)


def frequencies(modules: list[nn.Module]) -> Frequencies:
    """A copy of what rotary modules rotate with now."""
    found: Frequencies = {}
    for module in modules:
        names = [n for n, _ in module.named_buffers() if n.endswith("inv_freq")]
        names += [n for n in vars(module) if n.endswith("attention_scaling")]
        values = {n: getattr(module, n) for n in names if "original" not in n}
        found[module] = {
            n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in values.items()
        }
    return found


def _same(a: Frequencies, b: Frequencies) -> bool:
    return all(
        torch.equal(x, b[m][n]) if isinstance(x, torch.Tensor) else x == b[m][n]
        for m, values in a.items()
        for n, x in values.items()
    )


@contextmanager
def _set(module: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@dataclass(frozen=True)
class RotarySource:
    """A rotary module and the arguments, besides positions, that it was called with (a layer type,
    say).
    """

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def __call__(
        self, positions: torch.Tensor, dtype: torch.dtype, frozen: Frequencies | None = None
    ) -> CosSin:
        """cos and sin [rows, T, width] of `positions` [rows, T] in `dtype`, with the module's own
        frequencies or `frozen` ones.
        """
        like = torch.empty((1, 1, 1), dtype=dtype, device=positions.device)
        # The class's forward: hooks that watch the module's own calls must not see this one.
        forward, values = type(self.module).forward, (frozen or {}).get(self.module, {})
        if values:  # the forward within the one that would choose frequencies for these positions
            forward = inspect.unwrap(forward)
        with torch.no_grad(), _set(self.module, values):
            cos, sin = forward(self.module, like, positions, *self.args, **dict(self.kwargs))
        return cos, sin


@dataclass(frozen=True)
class TableSource:
    """An attention module that keeps a table of [sin | cos] by position (GPT-J, CodeGen)."""

    module: nn.Module

    def __call__(
        self, positions: torch.Tensor, dtype: torch.dtype, frozen: Frequencies | None = None
    ) -> CosSin:
        """cos and sin [rows, T, width / 2] of `positions` [rows, T] in `dtype`."""
        table = self.module.embed_positions
        assert isinstance(table, torch.Tensor)
        sin, cos = table.to(positions.device)[positions].to(dtype).chunk(2, dim=-1)
        return cos, sin


@dataclass
class Positions:
    """Position ids of the cached columns, in pages.

    They lie where the model is told them, on one device; what is made of them is wanted where a
    layer is.

    Attributes:
        page_size: tokens of a page.
        length: columns held.
        pages: [rows, page_size] int32 each; one row where all batch rows agree.
        epochs: (first column, frequencies from there on), for models that change them.
        regular: (columns looked at, position id minus column [rows] where that is one number a
            row); see `kvsmith.regular`.
        turns: by source, head dim and device, revolutions a position and scale; None where they
            cannot be told.
    """

    page_size: int
    length: int = 0
    pages: list[torch.Tensor] = field(default_factory=list)
    epochs: list[tuple[int, Frequencies]] = field(default_factory=list)
    regular: tuple[int, torch.Tensor | None] = (0, None)
    turns: dict[Any, tuple[torch.Tensor, float] | None] = field(default_factory=dict)
    _memo: dict[Any, CosSin] = field(default_factory=dict)
    _shared: dict[Any, torch.Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        frozen = [v for _, f in self.epochs for values in f.values() for v in values.values()]
        tensors = [*self.pages, *(v for v in frozen if isinstance(v, torch.Tensor))]
        return sum(t.nbytes for t in tensors)

    def append(self, ids: torch.Tensor, now: Frequencies | None = None) -> None:
        """Add position ids [rows, T], rotated with the frequencies `now` where these change."""
        if now and not (self.epochs and _same(self.epochs[-1][1], now)):
            self.epochs.append((self.length, now))
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
        self.regular = (min(self.regular[0], self.length), self.regular[1])
        self.epochs = [(first, f) for first, f in self.epochs if first < self.length]
        del self.pages[-(-self.length // self.page_size) :]

    def map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a row selection or repetition; shared rows stay shared."""
        self.regular = (0, None)
        if self.pages and self.pages[0].shape[0] > 1:
            self.pages = [change(p) for p in self.pages]

    def window(self, start: int, stop: int) -> torch.Tensor:
        """[rows, stop - start] int64 position ids of a range of columns."""
        first, last = start // self.page_size, -(-stop // self.page_size)
        ids = torch.cat(self.pages[first:last], dim=1)
        return ids[:, start - first * self.page_size : stop - first * self.page_size].long()

    def every(self) -> torch.Tensor:
        """[rows, columns held] int64, made once a forward pass."""
        return self.shared("every", lambda: self.window(0, self.length))

    def at(self, columns: torch.Tensor) -> torch.Tensor:
        """[B, C] int64 position ids of `columns` [B, C], any ids for those that there are not."""
        ids = self.every()
        index = columns.to(ids.device).clamp(0, self.length - 1)
        return ids.expand(index.shape[0], -1).gather(1, index)

    def cos_sin(
        self,
        source: RotarySource | TableSource,
        dtype: torch.dtype,
        start: int | None,
        stop: int,
        columns: torch.Tensor | None,
        device: torch.device,
    ) -> CosSin:
        """cos and sin of columns start..stop-1, or of `columns` [B, C], on `device`."""
        if start is None:
            assert columns is not None
            return _moved(self._chosen(source, self.at(columns), dtype, columns), device)
        key = (source, dtype, start, stop, device)
        if key not in self._memo:
            made = _moved(self._range(source, self.window(start, stop), dtype, start), device)
            held = sum(c.shape[1] for c, _ in self._memo.values() if c.device == device)
            if held + stop - start > _MEMO_TOKENS:
                return made
            self._memo[key] = made
        return self._memo[key]

    def _range(
        self, source: RotarySource | TableSource, ids: torch.Tensor, dtype: torch.dtype, start: int
    ) -> CosSin:
        """cos and sin of the columns from `start` on, whose position ids are `ids`."""
        if not self.epochs:
            return source(ids, dtype)
        stop, parts = start + ids.shape[1], []
        ends = [first for first, _ in self.epochs[1:]]
        for (first, frozen), end in zip(self.epochs, [*ends, stop], strict=True):
            a, b = max(first, start), min(end, stop)
            if a < b:
                parts.append(source(ids[:, a - start : b - start], dtype, frozen))
        return torch.cat([c for c, _ in parts], dim=1), torch.cat([s for _, s in parts], dim=1)

    def _chosen(
        self,
        source: RotarySource | TableSource,
        ids: torch.Tensor,
        dtype: torch.dtype,
        columns: torch.Tensor,
    ) -> CosSin:
        """cos and sin of `columns` [B, C], whose position ids are `ids`."""
        if not self.epochs:
            return source(ids, dtype)
        cos, sin = source(ids, dtype, self.epochs[0][1])
        columns = columns.to(ids.device)
        last = int(columns.max())
        for first, frozen in self.epochs[1:]:
            if first <= last:
                later, (c, s) = (columns >= first)[..., None], source(ids, dtype, frozen)
                cos, sin = torch.where(later, c, cos), torch.where(later, s, sin)
        return cos, sin

    def shared(self, key: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A small tensor that the layers of one forward pass share."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def end_pass(self) -> None:
        """Drop what the layers of one forward pass shared."""
        self._memo.clear()
        self._shared.clear()


def _moved(rope: CosSin, device: torch.device) -> CosSin:
    return rope[0].to(device), rope[1].to(device)
