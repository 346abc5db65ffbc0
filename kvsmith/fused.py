"""A decoding step of one layer as a single operation, where the kernel knows all about the layer.

`attention.attend_store` asks here first, on GPUs and CPUs. What `attend_encoded` does not serve
- a mask of the model's own, RoPE at positions with gaps, low-rank terms of keys before RoPE - goes
its general way, in chunks.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import TYPE_CHECKING

import torch

from kvsmith.kernels.attend_encoded.api import (
    Logits,
    Rope,
    Window,
    attend_encoded,
    chosen,
)
from kvsmith.kernels.partial import Partial
from kvsmith.key_rotation import KeyRotation
from kvsmith.regular import regular_rope, window_ids
from kvsmith.store import LayerStore

if TYPE_CHECKING:
    from kvsmith.attention import Mask, Rotation, Scores

# Columns that a query without a sliding window sees back.
UNLIMITED = 1 << 62


def attend_step(
    q: torch.Tensor,
    store: LayerStore,
    query: int,
    mask: Mask,
    rotate: Rotation,
    scores: Scores,
) -> Partial | None:
    """Attend to everything that a layer stores, the queries' own tokens included.

    Args:
        q: [B, Hq, T, D] rotated queries.
        store: the layer; the queries' tokens are in it.
        query: column of the first query.
        mask: visibility.
        rotate: RoPE of stored keys.
        scores: scale and its like.

    Returns:
        Partial with out [B, Hq, T, Dv], without the learned sink of `scores`; None where the
        general way is to be gone.
    """
    if not _serves(q, store, mask, rotate):
        return None
    bodies = store.bodies()
    impl, *others = (chosen(body, q) for body in bodies)
    if "reference" in (impl, *others):
        return None
    assert isinstance(rotate, KeyRotation) and store.sinks is not None and store.recent is not None
    positions, tail = rotate.positions, store.length - store.body_end
    rope: Rope | None = None
    at: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if rotate.source is not None:
        stop, padding = store.body_end, store.padding
        assert rotate.pairing is not None
        rope = regular_rope(positions, rotate.source, stop, padding, q, rotate.pairing)
        if rope is None:
            return None
        room = store.recent[0].shape[2]
        at = window_ids(positions, store.spec.sinks, padding, stop, room, q.device)
    sinks = Window(*store.sinks, at[0], 0, store.spec.sinks)
    recent = Window(*store.recent, at[1], store.body_end, tail)
    reach = None if mask.reach == UNLIMITED else mask.reach
    parts = []
    for body in bodies:
        numbers = (body.stop, body.begin, query, store.body_end, tail)
        key = ("counts", *numbers, q.device)
        part = attend_encoded(
            q,
            body,
            sinks,
            recent,
            query,
            Logits(scores.scale, scores.softcap, reach),
            rope=rope,
            first=store.padding,
            counts=positions.shared(key, partial(_sent, numbers, q.device)),
            windows=body is bodies[-1],
            impl=impl,
        )
        parts.append(part)
    return reduce(Partial.merge, parts)


def _serves(q: torch.Tensor, store: LayerStore, mask: Mask, rotate: Rotation) -> bool:
    """Whether the layer, the mask and the rotation are of the plain kind."""
    if not isinstance(rotate, KeyRotation) or not rotate.pairs_halves or mask.reach is None:
        return False
    if (mask.padding is None) != (store.padding is None):
        return False
    # The queries' own tokens must be among the dense ones, as they came.
    dense = store.length - store.body_end
    return 0 < store.encoded and q.shape[2] <= dense and store.is_plain


def _sent(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """[5] int64 on a device, without waiting for it."""
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
