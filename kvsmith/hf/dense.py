"""Families whose attention modules rotate and attend by themselves (Falcon, BLOOM, MPT, GPT-J).

They get dense keys and values of one layer at a time, decoded from the store. Keys arrive after
RoPE; for storage before it they are rotated back, exact up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from kvsmith.attention import CHUNK_ELEMENTS, Rotation
from kvsmith.hf.seam import Observer, Seam, SeamCache
from kvsmith.rope import CosSin
from kvsmith.store import LayerStore


def unrotate(seam: Seam, k: torch.Tensor) -> torch.Tensor:
    """Undo the rotation of new keys [B, H, T, D]: orthogonal up to the scale of cos and sin."""
    assert seam.call is not None
    if seam.call.rope is None:
        return k
    cos, sin = seam.call.rope
    scale = cos.square() + sin.square()  # 1, but for YaRN and LongRoPE
    return seam.turn(k, (cos / scale, -sin / scale))


def one_of_each_group(x: torch.Tensor, heads: int) -> torch.Tensor:
    """KV heads [B, H, T, D] of a tensor that repeats them for its query heads (Falcon)."""
    return x[:, :: x.shape[1] // heads]


def rebuild(
    store: LayerStore, before: int, rotate: Rotation, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense rotated keys and values of columns [0, before), [B, H, before, D], dtype of k and v."""
    B, heads = k.shape[0], store.geometry.kv_heads
    keys = k.new_zeros((B, heads, before, k.shape[3]))
    values = v.new_zeros((B, heads, before, v.shape[3]))
    chunk = max(1, CHUNK_ELEMENTS // (B * heads * k.shape[3]))
    own = None
    for part in store.segments(before, chunk):
        turned = rotate(part.k, part.start, part.columns)
        if part.start is None:
            own = (turned, part.v, part.columns)
            continue
        place = slice(part.start, part.start + part.k.shape[2])
        keys[:, :, place], values[:, :, place] = turned.to(k.dtype), part.v.to(v.dtype)
    if own is not None:
        # A padded row's exact sinks replace what the pages hold of them.
        turned, exact, columns = own
        assert columns is not None
        rows, slots = torch.where(columns < before)
        at = columns[rows, slots]
        keys[rows, :, at] = turned[rows, :, slots].to(k.dtype)
        values[rows, :, at] = exact[rows, :, slots].to(v.dtype)
    return keys, values


def join(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Stored tokens, repeated for the heads of the new ones, followed by the new ones."""
    return torch.cat([_repeat(old, new), new], dim=2)


def padding_of(mask: Any) -> torch.Tensor | None:
    """[B] columns of left padding read off a ready [B, 1, T, C] mask; None where there is none."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return None
    last = mask[:, 0, -1]
    seen = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
    padding = seen.to(torch.uint8).argmax(-1)
    return padding if bool(padding.any()) else None


class ObservingCache(DynamicCache, SeamCache):
    """Stores nothing; shows each owning layer's new keys before RoPE, and values, to an observer,
    and hands them to the layers that read them.
    """

    def __init__(self, observer: Observer, heads: list[int], owner: tuple[int, ...]) -> None:
        super().__init__()
        self.observer, self.heads, self.owner = observer, heads, owner
        self._handed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._seams: dict[int, Seam] = {}

    def begin(self, seam: Seam) -> None:
        """See `SeamCache`."""
        self._seams[seam.layer] = seam

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Show and pass on; the gradient of what is passed on reaches what was shown."""
        if self.owner[layer_idx] != layer_idx:
            return self._handed[self.owner[layer_idx]]
        seam, heads = self._seams[layer_idx], self.heads[layer_idx]
        assert seam.call is not None
        k = one_of_each_group(key_states, heads)
        v = one_of_each_group(value_states, heads)
        k = unrotate(seam, k)
        self.observer(layer_idx, k, v)
        rope: CosSin | None = seam.call.rope
        turned = _repeat(seam.turn(k, rope), key_states), _repeat(v, value_states)
        self._handed[layer_idx] = turned
        return turned


def _repeat(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(like.shape[1] // x.shape[1], dim=1).to(like.dtype)
