"""Encoded tokens that compete for a fixed number of places.

Newcomers take the slots of those that lose against them; who stays, stays where it is. Only blocks
of slots that change are encoded again, so tokens beside a change are decoded and encoded, often
many times. Identity, calibrated ranges and ranges within a head then give the same codes again. A
range or a choice of outliers that all heads share would not, since the tokens of a slot differ by
head and change apart; so here such codecs work on each head by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from kvsmith.codec import Codec
from kvsmith.eviction.tokens import Tokens
from kvsmith.layout import page_tensors
from kvsmith.pages import read, write


class Side:
    """Encoded keys, or values, of all slots.

    Args:
        codec: of all heads, or of one where heads are encoded apart.
        count: slots.
        block: tokens that are encoded at once.
        like: [B, H, T, D]; gives rows, heads, dtype and device.
    """

    def __init__(self, codec: Codec, count: int, block: int, like: torch.Tensor) -> None:
        self.codec, self.heads = codec, like.shape[1]
        self.split = codec.heads != self.heads
        infos = page_tensors(
            codec.spec, codec.heads, codec.dim, count, block, codec.store, like.dtype
        )
        rows = like.shape[0] * (self.heads if self.split else 1)
        self.tensors = {
            name: torch.zeros((rows, *info.shape), dtype=info.dtype, device=like.device)
            for name, info in infos.items()
        }

    @property
    def tile_order(self) -> torch.Tensor | None:
        """Channel at each place of tokens in tile order; None where they leave in no such order."""
        return self.codec.tile_order if self.codec.rotation is None else None

    def read(self, stop: int, tiles: bool = False) -> torch.Tensor:
        """Decode the slots before `stop`, [B, H, stop, D], with `tiles` in tile order."""
        x = read([self.tensors], self.codec, 0, stop, tiles)
        return x.view(-1, self.heads, *x.shape[2:])

    def write(self, start: int, x: torch.Tensor) -> None:
        """Encode tokens [B, H, T, D] into the slots from `start` on."""
        write(self.tensors, self.codec, start, x.flatten(0, 1)[:, None] if self.split else x)

    def map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a row selection or repetition."""
        for name, tensor in self.tensors.items():
            if self.split:
                tensor = change(tensor.unflatten(0, (-1, self.heads))).flatten(0, 1)
                self.tensors[name] = tensor
            else:
                self.tensors[name] = change(tensor)


class Slots:
    """The slots of one layer.

    Args:
        codecs: of keys and values.
        count: slots of each row and KV head, a multiple of block.
        block: tokens that are encoded at once.
        by_head: whether KV heads keep different tokens.
        k, v: [B, H, T, D] keys and values; give rows, heads, dtype and device.
    """

    def __init__(
        self,
        codecs: tuple[Codec, Codec],
        count: int,
        block: int,
        by_head: bool,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> None:
        self.count, self.block, self.by_head = count, block, by_head
        self.sides = (Side(codecs[0], count, block, k), Side(codecs[1], count, block, v))
        self.columns = k.new_full((*k.shape[:2], count), -1, dtype=torch.int32)
        self.used = 0  # slots in use in the fullest row; they come first

    def read(self, tiles: tuple[bool, bool] = (False, False)) -> Tokens | None:
        """The slots in use, decoded, keys and values with `tiles` in tile order where the codec has
        one; None where there are none.
        """
        if not self.used:
            return None
        stop = -(-self.used // self.block) * self.block
        orders = [s.tile_order if t else None for s, t in zip(self.sides, tiles, strict=True)]
        k, v = (
            side.read(stop, order is not None)[:, :, : self.used]
            for side, order in zip(self.sides, orders, strict=True)
        )
        columns = self.columns[:, :, : self.used]
        if not self.by_head:
            columns = columns[:, :1]
        return Tokens(k, v, columns.long().expand(*k.shape[:3]), None, *orders)

    def admit(self, pool: Tokens, priority: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the best of a pool that begins with what `read` gave.

        Args:
            pool: tokens in the slots, then newcomers.
            priority: [B, H, C] float32; the highest stay, ties go to the earlier place.

        Returns:
            source: [B, H, slots in use] int64, the place in the pool of the token in each slot;
            kept: [B, H, C] bool, which tokens of the pool stay.
        """
        order = priority.sort(dim=-1, descending=True, stable=True).indices
        kept = torch.zeros_like(priority, dtype=torch.bool)
        kept = kept.scatter_(2, order[:, :, : self.count], True) & (pool.columns >= 0)
        before, self.used = self.used, min(self.count, pool.columns.shape[2])
        stay = F.pad(kept[:, :, :before], (0, self.used - before))
        arrived = kept[:, :, before:]
        # The n-th newcomer takes the n-th slot that is free.
        newcomer = arrived.int().sort(dim=-1, descending=True, stable=True).indices + before
        rank = (~stay).cumsum(-1) - 1
        fill = ~stay & (rank < arrived.sum(-1, keepdim=True))
        own = torch.arange(self.used, device=kept.device).expand_as(stay)
        source = torch.where(fill, newcomer.gather(2, rank.clamp(0, arrived.shape[2] - 1)), own)
        columns = pool.columns.gather(2, source).masked_fill(~(stay | fill), -1)
        self.columns[:, :, : self.used] = columns.int()
        self._encode(pool, source, fill)
        return source, kept

    def _encode(self, pool: Tokens, source: torch.Tensor, changed: torch.Tensor) -> None:
        """Write the blocks in which a slot of any row or head has changed."""
        tail = -changed.shape[2] % self.block
        blocks = F.pad(changed.any(0).any(0), (0, tail)).view(-1, self.block).any(-1)
        for first, last in _runs(blocks.tolist()):
            start, stop = first * self.block, last * self.block
            placed = pool.take(source[:, :, start:stop])
            for side, part in zip(self.sides, (placed.k, placed.v), strict=True):
                side.write(start, F.pad(part, (0, 0, 0, stop - start - part.shape[2])))

    def map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a row selection or repetition."""
        for side in self.sides:
            side.map_rows(change)
        self.columns = change(self.columns)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor of encoded tokens."""
        for side in self.sides:
            yield from side.tensors.values()


def _runs(flags: list[bool]) -> Iterator[tuple[int, int]]:
    """First and last + 1 of every run of true flags."""
    start = None
    for i, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = i
        elif not flag and start is not None:
            yield start, i
            start = None
