"""What eviction does to a layer of the full model: replayed by the runtime's own store.

The model reads text with full attention once. At each layer queries, keys and values pass by, and
an `EvictingStore` takes them in the steps in which decoding token by token would evict, block by
block, so that between two evictions every query sees what it would see there.
Kept are the attention over the tokens that are there, and the tokens that go, in the order in which
they go. No T x T map exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvsmith.attention import Mask, Scores, attend_dense
from kvsmith.errors import explain
from kvsmith.eviction.attention import attend_there, rotate_tokens
from kvsmith.eviction.store import EvictingStore
from kvsmith.eviction.tokens import Tokens
from kvsmith.geometry import ModelGeometry
from kvsmith.hf.answer import answering, mask_of
from kvsmith.hf.dense import one_of_each_group, unrotate
from kvsmith.hf.masks import BiasMask, LazyMask
from kvsmith.hf.seam import ATTACHED, HANDLE, Seam, SeamCache, attach
from kvsmith.kernels.partial import Partial
from kvsmith.rope import CosSin


@dataclass(frozen=True)
class Layer:
    """Activations of one layer of the full model for some sequences; where others read its tokens,
    with their queries beside its own, as `ModelGeometry.joined` lays them out.

    Attributes:
        index: the layer.
        q: [B, Hq, T, D] after RoPE.
        k: [B, H, T, D] before RoPE.
        v: [B, H, T, Dv].
        rope: cos and sin of the T positions, None without RoPE.
        turn: the model's rotary function.
        out: [B, Hq, T, Dv] full attention.
        scores: scale and its like.
        bias: [B, Hq, T, T] float32 that is added to logits (ALiBi), None for none.
    """

    index: int
    q: Tensor
    k: Tensor
    v: Tensor
    rope: CosSin | None
    turn: Callable[[Tensor, CosSin | None], Tensor]
    out: Tensor
    scores: Scores
    bias: BiasMask | None = None


# May return another attention to go on with, [B, Hq, T, Dv], where no other layer reads the tokens.
Visit = Callable[[Layer], Tensor | None]


class Sweep(DynamicCache, SeamCache):  # type: ignore[misc]
    """Stores nothing; shows each owning layer's activations to a visitor when its last reader has
    attended.
    """

    def __init__(self, visit: Visit, shape: ModelGeometry) -> None:
        super().__init__()
        self.visit, self.shape = visit, shape
        self._seams: dict[int, Seam] = {}
        self._handed: dict[int, tuple[Tensor, Tensor]] = {}
        self._seen: dict[int, list[Layer]] = {}

    def begin(self, seam: Seam) -> None:
        """See `SeamCache`."""
        self._seams[seam.layer] = seam

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Hand the owner's keys on with a handle."""
        seam, owner = self._seams[layer_idx], self.shape.owner[layer_idx]
        assert seam.call is not None
        if not seam.deferred:
            return self._answering(seam, key_states, value_states), value_states
        if owner == layer_idx:
            handed = key_states.view_as(key_states)
            setattr(handed, HANDLE, _Handle(self, owner, key_states, seam.call.rope))
            self._handed[owner] = handed, value_states
        return self._handed[owner]

    def show(self, reader: int, seen: Layer) -> Tensor | None:
        """What the visitor says; of layers that share it sees the queries of all together."""
        readers = self.shape.readers(seen.index)
        parts = self._seen.setdefault(seen.index, [])
        parts.append(seen)
        if reader != readers[-1]:
            return None
        self._handed.pop(seen.index, None)
        return self.visit(_joined(self._seen.pop(seen.index)))

    def _answering(self, seam: Seam, k: Tensor, v: Tensor) -> Tensor:
        """For modules that attend by themselves; see `hf.answer`."""
        assert seam.call is not None
        heads = seam.attachment.geometry.layers[seam.layer].kv_heads
        new, values = one_of_each_group(k, heads), one_of_each_group(v, heads)
        mask, scores = mask_of(seam.call.mask), Scores(k.shape[-1] ** -0.5)
        shown = (unrotate(seam, new.detach()), values.detach(), seam.call.rope, seam.turn)
        bias = mask if isinstance(mask, BiasMask) else None

        def answer(q: Tensor) -> Tensor:
            with torch.no_grad():
                out = attend_dense(q, new, values, mask, scores.scale).transpose(1, 2)
            other = self.visit(Layer(seam.layer, q.detach(), *shown, out, scores, bias))
            return out if other is None else other

        return answering(k, answer)


def _joined(parts: Sequence[Layer]) -> Layer:
    if len(parts) == 1:
        return parts[0]
    first, heads = parts[0], parts[0].k.shape[1]
    q, out = _beside([p.q for p in parts], heads, 1), _beside([p.out for p in parts], heads, 1)
    sinks = [p.scores.sink for p in parts if p.scores.sink is not None]
    sink = _beside(sinks, heads, 0) if sinks else None
    return replace(first, q=q, out=out, scores=replace(first.scores, sink=sink))


def _beside(parts: Sequence[Tensor], heads: int, dim: int) -> Tensor:
    """Query heads of several readers, for each KV head those of each reader in turn."""
    return torch.stack([x.unflatten(dim, (heads, -1)) for x in parts], dim + 1).flatten(
        dim, dim + 2
    )


@dataclass
class _Handle:
    sweep: Sweep
    owner: int
    k: Tensor
    rope: CosSin | None
    before: int = 0

    def attend(
        self,
        seam: Seam,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        scores: Scores,
    ) -> Tensor:
        assert seam.call is not None
        q = seam.turn(q, seam.call.rope)
        with torch.no_grad():
            out = attend_dense(q, seam.turn(k, self.rope), v, mask, scores.scale)
        shown = q.detach(), self.k.detach(), v.detach(), self.rope, seam.turn
        seen = Layer(self.owner, *shown, out.transpose(1, 2), scores)
        other = self.sweep.show(seam.layer, seen)
        return out if other is None else other.transpose(1, 2)


@torch.no_grad()
def sweep(model: PreTrainedModel, ids: Tensor, visit: Visit) -> None:
    """Read sequences [B, T] with full attention and show every owning layer's activations."""
    forward(model, ids, visit, logits_to_keep=1)


def forward(model: PreTrainedModel, ids: Tensor, visit: Visit, **more: int) -> Tensor:
    """Logits of sequences [B, T] read at once, with what the visitor returns as attention."""
    attach(model)
    attachment = ATTACHED[model]
    if attachment.shared and not attachment.deferred:
        where = f"model ({model.config.model_type})"
        expected = "by transformers' attention interface, for a state where layers share"
        raise ValueError(explain(where, "attention", expected, "the module's own"))
    cache = Sweep(visit, attachment.geometry)
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, **more)
    return out.logits


@dataclass(frozen=True)
class Replay:
    """What eviction leaves of a layer's attention, from the first query that misses a token on.

    Attributes:
        first: position of that query.
        block: queries between two evictions.
        kept: [B, Hq, E * block, ...] attention over the tokens that are there.
        k: [B, H, E * block, D] keys after RoPE in the order in which they go; block e goes before
            the queries of block e come.
        v: [B, H, E * block, Dv] their values.
    """

    first: int
    block: int
    kept: Partial
    k: Tensor
    v: Tensor


@torch.no_grad()
def replay(layer: Layer, store: EvictingStore, whole: Tensor | None = None) -> Replay | None:
    """Let a store evict as decoding token by token would.

    Args:
        layer: activations.
        store: empty, for a layer of this shape; its state is not asked.
        whole: [B, Hq, T] lse of full attention, for scores as in H2O's published code; None for
            those of decoding.

    Returns:
        None where the sequences are too short for a block of queries that misses a token.
    """
    block, first, T = store.spec.block_size, store.policy.budget, layer.q.shape[2]
    count = (T - first) // block
    if count < 1:
        return None
    parts: list[Partial] = []
    gone: list[Tokens] = []

    rotate, done = _Rotation(layer), 0
    # Nothing goes before the budget is full, then one block for each block that comes.
    for size in (first, *[block] * count):
        span = slice(done, done + size)
        k = layer.k[:, :, span]
        store.append(k, layer.v[:, :, span])
        rope = None if layer.rope is None else (layer.rope[0][:, span], layer.rope[1][:, span])
        new = (layer.q[:, :, span], layer.turn(k, rope), layer.v[:, :, span])
        mask = _causal(done, size, k) if layer.bias is None else _Later(layer.bias, done)
        seen = None if whole is None else whole[:, :, span]
        part, mass = attend_there(*new, store, mask, rotate, layer.scores, seen)
        store.settle(mass, gone.append)
        parts.append(part)
        done += size
    lost = Tokens.join(gone[:count])
    after = parts[1:]
    kept = Partial(torch.cat([p.out for p in after], 2), torch.cat([p.lse for p in after], 2))
    return Replay(first, block, kept, rotate_tokens(rotate, lost), lost.v)


@dataclass(frozen=True)
class _Rotation:
    """RoPE of a layer's keys, where positions are columns; see `attention.Rotation`."""

    layer: Layer
    pairs_halves = False

    def tiles(self, k: Tensor, start: int | None, columns: Tensor | None, order: Tensor) -> Tensor:
        raise AssertionError("keys in tile order were not asked for")

    def __call__(self, k: Tensor, start: int | None, columns: Tensor | None) -> Tensor:
        rope = self.layer.rope
        if rope is None:
            return self.layer.turn(k, None)
        cos, sin = rope
        if start is not None:
            span = slice(start, start + k.shape[2])
            return self.layer.turn(k, (cos[:, span], sin[:, span]))
        assert columns is not None
        index = columns.clamp(min=0)[..., None].expand(-1, -1, cos.shape[2])
        rows = (x.expand(len(index), -1, -1).gather(1, index) for x in (cos, sin))
        return self.layer.turn(k, (next(rows), next(rows)))


@dataclass
class _Later:
    """The mask of queries from `first` on."""

    bias: BiasMask
    first: int
    padding = None
    is_causal = False
    reach = None

    def window(self, rows: slice, columns: slice) -> Tensor | None:
        return self.bias.window(slice(self.first + rows.start, self.first + rows.stop), columns)


def _causal(before: int, size: int, like: Tensor) -> LazyMask:
    return LazyMask(
        {
            "batch_size": like.shape[0],
            "q_length": size,
            "kv_length": before + size,
            "q_offset": before,
            "allow_is_causal_skip": True,
            "device": like.device,
        }
    )
