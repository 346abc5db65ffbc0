"""The tokens of one layer: dense sinks, encoded pages, a dense recent window.

Tokens move one way, in blocks: appended -> recent window -> encoded page. Columns count every token
since the cache was empty, padding included, so that a column means the same in every row:

    columns 0 .. S-1          sinks (each row keeps its own first S real tokens dense)
    columns S .. S+E-1        pages, E a multiple of block_size
    columns S+E .. length-1   recent window

With left padding a row's sinks lie further right and are hidden in the page that also holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from kvsmith.codec import Codec
from kvsmith.errors import explain
from kvsmith.geometry import LayerGeometry
from kvsmith.kernels.attend_encoded.api import Body, Side
from kvsmith.kernels.low_rank.api import LowRankTerm
from kvsmith.layout import page_layout
from kvsmith.page_table import PageTable
from kvsmith.pages import Page, new_page, read, read_low_rank, write
from kvsmith.pairing import Pairing
from kvsmith.sinks import Pair, empty_pair, sink_columns, write_sinks
from kvsmith.spec import CodecSpec


@dataclass(frozen=True)
class Segment:
    """Some tokens of a layer, dense.

    Attributes:
        k: [B, H, C, D] keys in the stored domain and order of channels.
        v: [B, H, C, Dv] values.
        start: first column where the segment is one range of columns, else None.
        columns: [B, C] int64 columns where each row has its own, else None.
        k_order, v_order: [D] int64, the channel at each place where they leave in tile order (see
            `decode_tiles`); None in the order in which they were encoded.
        k_turn, v_turn: [H or 1, D, D] rotation that is still on them; None for none.
        k_low, v_low: low-rank terms that k and v lack, channels in the same order; None for none.
    """

    k: torch.Tensor
    v: torch.Tensor
    start: int | None
    columns: torch.Tensor | None = None
    k_order: torch.Tensor | None = None
    v_order: torch.Tensor | None = None
    k_turn: torch.Tensor | None = None
    v_turn: torch.Tensor | None = None
    k_low: LowRankTerm | None = None
    v_low: LowRankTerm | None = None


class LayerStore:
    """Keys and values of one layer as they are stored.

    Args:
        spec: codec and windows.
        geometry: the layer's shape.
        page_size: tokens of a page.
        k: codec of the keys.
        v: codec of the values.

    Attributes:
        pairing: in whose order the channels of keys lie; None for natural order.
    """

    def __init__(
        self, spec: CodecSpec, geometry: LayerGeometry, page_size: int, k: Codec, v: Codec
    ) -> None:
        self.spec, self.geometry, self.page_size = spec, geometry, page_size
        self.codecs = (k, v)
        self.pairing: Pairing | None = None
        self.clear()

    @property
    def key_domain(self) -> Literal["pre", "post"]:
        """Whether keys lie as before or as after RoPE."""
        return self.spec.key_domain

    def arrange(self, pairing: Pairing | None) -> None:
        """Have keys lie in the order of these pairs, from the first token on."""
        if pairing is not None and self.pairing is None:
            assert self.length == 0
            self.pairing = pairing
            self.codecs[0].arrange(pairing)

    def clear(self) -> None:
        """Forget every token and free the memory."""
        self.length = self.encoded = 0
        self.pages: list[Page] = []
        self.freed = 0  # pages that a sliding window has left behind
        self.prompt_pages = 0  # pages begun by the first step, whose low rank may differ
        self.sinks: Pair | None = None
        self.recent: Pair | None = None
        self.padding: torch.Tensor | None = None
        self._table = PageTable()

    @property
    def batch_size(self) -> int:
        """Rows B; 0 before the first token."""
        return 0 if self.recent is None else self.recent[0].shape[0]

    @property
    def body_end(self) -> int:
        """First column of the recent window."""
        return self.spec.sinks + self.encoded

    @property
    def is_plain(self) -> bool:
        """Whether all tokens are encoded, with factors of keys only after RoPE."""
        post = self.spec.key_domain == "post"
        whole = not any(c.is_identity for c in self.codecs)
        return whole and (post or self.codecs[0].factors is None)

    def bodies(self) -> list[Body]:
        """The encoded tokens as a kernel reads them, for a store that `is_plain`: one run of pages,
        or one for each of two ranks.
        """
        held, split = len(self.pages), self.prompt_pages - self.freed
        if 0 < split < held and self.pages[0].layout != self.pages[-1].layout:
            return [self._body(0, split), self._body(split, held)]
        return [self._body(0, held)]

    def _body(self, first: int, last: int) -> Body:
        """Of the pages [first, last) that are held."""
        pages, sides = self.pages[first:last], []
        for i, c in enumerate(self.codecs):
            left = pages[0].sides[i].get("left") if pages else None
            rank = 0 if left is None else left.shape[-2]
            sides.append(Side(c.format, c.tables, c.dim, c.rotation, c.factors, rank))
        table = self._table.of(self.pages)[first:] if pages else None
        begin, stop = ((self.freed + n) * self.page_size for n in (first, last))
        heads, stop = self.geometry.kv_heads, min(stop, self.encoded)
        return Body(pages, table, heads, self.page_size, begin, stop, *sides)

    # -- writing ----------------------------------------------------------------------------------

    def append(self, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor | None = None) -> None:
        """Add tokens to every row.

        Args:
            k: [B, H, T, D] keys in the stored domain, channels in natural order.
            v: [B, H, T, Dv] values.
            padding: [B] int64, columns of left padding in each row as far as known; None for none.

        Raises:
            ValueError: the batch size or the heads differ from what is stored.
        """
        k, v = k.detach(), v.detach()
        k = k if self.pairing is None else self.pairing.arranged(k)
        self._start(k, v)
        self._check(k)
        if padding is not None:
            self.padding = padding
        assert self.sinks is not None
        write_sinks(self.sinks, (k, v), self.length, self.padding)
        skip = min(max(self.spec.sinks - self.length, 0), k.shape[2])
        held, before = max(self.length - self.body_end, 0), self.length
        self.length += k.shape[2]
        self._write_recent((k[:, :, skip:], v[:, :, skip:]), held, before == 0)
        # The queries of this step still read what the first of them can see.
        self._free_passed(before or self.length)

    def _start(self, k: torch.Tensor, v: torch.Tensor) -> None:
        if self.recent is not None:
            return
        B, H = k.shape[:2]
        room = self.spec.recent + self.spec.block_size
        self.sinks = empty_pair(k, v, (B, H, self.spec.sinks))
        self.recent = empty_pair(k, v, (B, H, room))
        for codec in self.codecs:
            codec.to(k.device)

    def _check(self, k: torch.Tensor) -> None:
        expected = (self.batch_size, self.geometry.kv_heads, self.geometry.k_dim)
        if (k.shape[0], k.shape[1], k.shape[3]) != expected:
            raise ValueError(
                explain("cache", "batch, KV heads, head dim", str(expected), str(tuple(k.shape)))
            )

    def _write_recent(self, new: Pair, held: int, in_prompt: bool) -> None:
        """Join `held` recent tokens with the new ones; encode the oldest blocks, keep the rest
        dense.
        """
        assert self.recent is not None
        block, total = self.spec.block_size, held + new[0].shape[2]
        count = max(total - self.spec.recent, 0) // block * block
        done = 0
        while done < count:
            # Page-sized steps keep the transient copy of a long prompt small.
            step = min(self.page_size - self.encoded % self.page_size, count - done)
            k, v = (
                _window(r, x, held, done, done + step)
                for r, x in zip(self.recent, new, strict=True)
            )
            self._encode(k, v, in_prompt)
            done += step
        for buffer, x in zip(self.recent, new, strict=True):
            if count:
                buffer[:, :, : total - count] = _window(buffer, x, held, count, total)
            else:
                buffer[:, :, held:total] = x

    def _encode(self, k: torch.Tensor, v: torch.Tensor, in_prompt: bool) -> None:
        offset = self.encoded % self.page_size
        if offset == 0:
            spec = self.spec.of_prompt() if in_prompt else self.spec
            layout = page_layout(spec, self.geometry, self.page_size, k.dtype)
            self.pages.append(new_page(layout, k))
            self._table.add(self.pages)
            self.prompt_pages += in_prompt
        for codec, tensors, x in zip(self.codecs, self.pages[-1].sides, (k, v), strict=True):
            write(tensors, codec, offset, x)
        self.encoded += k.shape[2]

    def _free_passed(self, query: int) -> None:
        """Free pages that a query at column `query` cannot see; a page of slack lets a few tokens
        be cropped.
        """
        if self.geometry.window is None:
            return
        passed = (query - self.geometry.window - self.spec.sinks) // self.page_size - 1
        # A page that is not full is written to again.
        count = max(min(passed, self.encoded // self.page_size) - self.freed, 0)
        if count:
            del self.pages[:count]
            self.freed += count
            self._table.forget()

    # -- reading ----------------------------------------------------------------------------------

    def segments(
        self,
        stop: int,
        chunk: int,
        k_tiles: bool = False,
        v_tiles: bool = False,
        apart: tuple[bool, bool] = (False, False),
    ) -> Iterator[Segment]:
        """Yield the tokens of columns [0, stop) as dense segments.

        Args:
            stop: columns to read.
            chunk: encoded tokens to decode at once, rounded to whole pages.
            k_tiles, v_tiles: whether decoded keys, values may leave in tile order and rotated.
            apart: whether the low-rank terms of keys and of values leave as factors, where they
                are in no rotation that the keys or values are not in.
        """
        S = self.spec.sinks
        if self.sinks is not None and stop > 0 and S:
            k, v = self.sinks
            if self.padding is None:
                used = min(S, stop)
                yield Segment(k[:, :, :used], v[:, :, :used], 0)
            else:
                yield Segment(k, v, None, sink_columns(self.padding, self.spec.sinks))
        body = min(self.encoded, stop - S)
        run = max(1, chunk // self.page_size)
        last = -(-max(body, 0) // self.page_size)
        first = self.freed
        while first < last:
            # Pages whose low ranks differ are not decoded together.
            limit = self.prompt_pages if first < self.prompt_pages else last
            stop_page = min(first + run, limit, last)
            stop_token = min(body, stop_page * self.page_size)
            yield self._decode(first, stop_token, (k_tiles, v_tiles), apart)
            first = stop_page
        if stop > self.body_end and self.recent is not None:
            k, v = self.recent
            yield Segment(
                k[:, :, : stop - self.body_end], v[:, :, : stop - self.body_end], self.body_end
            )

    def _decode(
        self, first: int, stop: int, tiles: tuple[bool, bool], apart: tuple[bool, bool]
    ) -> Segment:
        """Decode the pages from `first` on, up to body token `stop`."""
        tokens = stop - first * self.page_size
        blocks = -(-tokens // self.spec.block_size) * self.spec.block_size
        pages = self.pages[first - self.freed : -(-stop // self.page_size) - self.freed]
        dense, orders, turns, lows = [], [], [], []
        for side, (codec, wanted) in enumerate(zip(self.codecs, tiles, strict=True)):
            order = codec.tile_order if wanted else None
            sides, tiled = [p.sides[side] for p in pages], order is not None
            alone = apart[side] and (wanted or codec.rotation is None)
            x = read(sides, codec, 0, blocks, tiled, wanted, alone)
            dense.append(x[:, :, :tokens])
            orders.append(order)
            turns.append(codec.rotation if wanted else None)
            lows.append(read_low_rank(sides, codec, 0, blocks, tiled) if alone else None)
        start = self.spec.sinks + first * self.page_size
        ways = (orders[0], orders[1], turns[0], turns[1], lows[0], lows[1])
        return Segment(dense[0], dense[1], start, None, *ways)

    # -- rearranging ------------------------------------------------------------------------------

    def map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a row selection or repetition to every stored tensor.

        Args:
            change: maps a tensor [B, ...] to [B', ...].
        """
        if self.recent is None or self.sinks is None:
            return
        self.sinks = (change(self.sinks[0]), change(self.sinks[1]))
        self.recent = (change(self.recent[0]), change(self.recent[1]))
        self.padding = None if self.padding is None else change(self.padding)
        self.pages = [Page(p.layout, change(p.buffer)) for p in self.pages]
        self._table.forget()

    def crop(self, length: int) -> None:
        """Forget the tokens from column `length` on.

        A block cut in the middle goes back to the recent window as it decodes.

        Raises:
            ValueError: the tokens needed were freed by a sliding window.
        """
        if length >= self.length:
            return
        cut = max(length - self.spec.sinks, 0)
        if cut < self.encoded:
            self._uncode(cut)
        self.length = length

    def _uncode(self, cut: int) -> None:
        assert self.recent is not None
        whole = cut // self.spec.block_size * self.spec.block_size
        index, offset = divmod(whole, self.page_size)
        if index < self.freed:
            raise ValueError(
                explain("cache.crop", "length", "inside the sliding window", cut + self.spec.sinks)
            )
        if cut > whole:
            for side, codec in enumerate(self.codecs):
                page = self.pages[index - self.freed].sides[side]
                block = read([page], codec, offset, offset + self.spec.block_size)
                self.recent[side][:, :, : cut - whole] = block[:, :, : cut - whole]
        self.encoded = whole
        left = -(-whole // self.page_size)
        del self.pages[left - self.freed :]
        self.prompt_pages = min(self.prompt_pages, left)

    # -- counting ---------------------------------------------------------------------------------

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every allocated tensor as (body | windows | parameters, tensor)."""
        for page in self.pages:
            yield "body", page.buffer
        for pair in (self.sinks, self.recent):
            yield from (("windows", t) for t in pair or ())
        for codec in self.codecs:
            yield from (("parameters", t) for t in codec.tensors())


def _window(
    held: torch.Tensor, new: torch.Tensor, count: int, start: int, stop: int
) -> torch.Tensor:
    """Tokens [start, stop) of the first `count` tokens of `held` followed by `new`; a copy where
    both are needed.
    """
    if start >= count:
        return new[:, :, start - count : stop - count]
    if stop <= count:
        return held[:, :, start:stop].clone()
    return torch.cat([held[:, :, start:count], new[:, :, : stop - count]], dim=2)
