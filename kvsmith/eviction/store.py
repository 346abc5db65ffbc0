"""The tokens that one layer keeps under eviction: dense sinks, slots, a dense recent window.

    sinks     the first tokens of each row, dense
    slots     encoded tokens that compete; every KV head has its own
    recent    the newest tokens, dense
    pending   tokens of the step in hand, until attention has seen them

Memory is fixed by the budget: sinks + slots + room of the recent window. A step ends with `settle`:
tokens leave the recent window in blocks and compete with those in the slots; the losers are handed
on once, for the state, and are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch

from kvsmith.codec import Codec
from kvsmith.errors import explain
from kvsmith.eviction.policy import Policy
from kvsmith.eviction.slots import Slots
from kvsmith.eviction.tokens import Fold, Tokens
from kvsmith.geometry import LayerGeometry
from kvsmith.less.state import State
from kvsmith.pairing import Pairing
from kvsmith.sinks import Pair, empty_pair, sink_columns, write_sinks
from kvsmith.spec import CodecSpec, slot_tokens


class EvictingStore:
    """Keys and values that one layer keeps.

    Args:
        spec: codec and windows.
        geometry: the layer's shape.
        policy: which tokens stay.
        k: codec of the keys, see `layout.slot_heads`.
        v: codec of the values.
        state: what remains of the others; None for nothing.

    Attributes:
        pairing: in whose order the channels of keys lie; None for natural order.
    """

    def __init__(
        self,
        spec: CodecSpec,
        geometry: LayerGeometry,
        policy: Policy,
        k: Codec,
        v: Codec,
        state: State | None = None,
    ) -> None:
        self.spec, self.geometry, self.policy = spec, geometry, policy
        self.codecs, self.state = (k, v), state
        self.count = slot_tokens(spec, policy.budget)
        self.room = policy.budget - spec.sinks - self.count
        self.pairing: Pairing | None = None
        self.clear()

    @property
    def key_domain(self) -> Literal["pre", "post"]:
        """Keys that nothing encodes lie rotated: every step would turn them again."""
        return "post" if self.codecs[0].is_identity else self.spec.key_domain

    def arrange(self, pairing: Pairing | None) -> None:
        """Have keys lie in the order of these pairs, from the first token on."""
        if pairing is not None and self.pairing is None:
            assert self.length == 0
            self.pairing = pairing
            self.codecs[0].arrange(pairing)

    def natural(self, x: torch.Tensor) -> torch.Tensor:
        """Queries or keys [..., D] in natural order, which the state's features know."""
        return x if self.pairing is None else self.pairing.natural(x)

    def clear(self) -> None:
        """Forget every token and free the memory."""
        self.length = 0
        self.start = self.spec.sinks  # first column of the recent window
        self.sinks: Pair | None = None
        self.recent: Pair | None = None
        self.pending: Pair | None = None
        self.slots: Slots | None = None
        self.scores: torch.Tensor | None = None  # [B, H, slots + room] float32
        self.padding: torch.Tensor | None = None
        if self.state is not None:
            self.state.clear()

    @property
    def batch_size(self) -> int:
        """Rows B; 0 before the first token."""
        return 0 if self.recent is None else self.recent[0].shape[0]

    # -- writing ----------------------------------------------------------------------------------

    def append(self, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor | None = None) -> None:
        """Add tokens to every row; `settle` follows when attention has seen them.

        Args:
            k: [B, H, T, D] keys in the stored domain, channels in natural order.
            v: [B, H, T, Dv] values.
            padding: [B] int64, columns of left padding in each row as far as known; None for none.

        Raises:
            ValueError: the batch size or the heads differ from what is stored.
        """
        assert self.pending is None, "the step before was not settled"
        k, v = k.detach(), v.detach()
        k = k if self.pairing is None else self.pairing.arranged(k)
        if self.recent is None:
            self._allocate(k, v)
        expected = (self.batch_size, self.geometry.kv_heads, self.geometry.k_dim)
        if (k.shape[0], k.shape[1], k.shape[3]) != expected:
            raise ValueError(
                explain("cache", "batch, KV heads, head dim", str(expected), str(tuple(k.shape)))
            )
        if padding is not None:
            self.padding = padding
        assert self.sinks is not None
        write_sinks(self.sinks, (k, v), self.length, self.padding)
        self.pending = k, v
        self.length += k.shape[2]

    def _allocate(self, k: torch.Tensor, v: torch.Tensor) -> None:
        B, H = k.shape[:2]
        self.sinks = empty_pair(k, v, (B, H, self.spec.sinks))
        self.recent = empty_pair(k, v, (B, H, self.room))
        self.slots = Slots(self.codecs, self.count, self.spec.block_size, self.policy.by_head, k, v)
        if self.policy.scored:
            self.scores = k.new_zeros((B, H, self.count + self.room), dtype=torch.float32)
        if self.state is not None:
            self.state.start(v)
        for codec in self.codecs:
            codec.to(k.device)

    def settle(self, mass: torch.Tensor | None, fold: Fold | None = None) -> None:
        """End a step: what tokens turned out to be worth decides who stays.

        Args:
            mass: [B, H, C] float32, attention that the tokens of `kept` and the new ones received;
                None where the policy does not ask.
            fold: takes the tokens that go; None forgets them.
        """
        assert self.pending is not None and self.recent is not None and self.slots is not None
        before = self.length - self.pending[0].shape[2]
        held = max(before - self.start, 0)
        skip = min(max(self.spec.sinks - before, 0), self.length - before)
        (k, v), self.pending = (x[:, :, skip:] for x in self.pending), None
        total = held + k.shape[2]
        scores = None if mass is None else self._scored(mass, held, total)
        block = self.spec.block_size
        gone = max(total - self.room + block, 0) // block * block
        if gone:
            k, v = (
                torch.cat([r[:, :, :held], x], 2) for r, x in zip(self.recent, (k, v), strict=True)
            )
            new = self._shown(Tokens.at(k[:, :, :gone], v[:, :, :gone], self.start))
            scores = self._compete(new, scores, fold)
            self.start += gone
            held = 0
        for buffer, x in zip(self.recent, (k, v), strict=True):
            buffer[:, :, held : total - gone] = x[:, :, gone:]
        if scores is not None and self.scores is not None:
            used = self.slots.used
            self.scores[:, :, :used] = scores[:, :, :used]
            self.scores[:, :, self.count : self.count + total - gone] = scores[:, :, used:]

    def _scored(self, mass: torch.Tensor, held: int, total: int) -> torch.Tensor:
        """Scores of [slots in use | recent window | new tokens] after this step."""
        assert self.scores is not None and self.slots is not None
        used = self.slots.used
        old = torch.nn.functional.pad(
            torch.cat([self.scores[:, :, :used], self.scores[:, :, self.count :][:, :, :held]], 2),
            (0, total - held),
        )
        # Masses of sinks come first, and are not asked for.
        return self.policy.update(old, mass[:, :, mass.shape[2] - old.shape[2] :])

    def _compete(
        self, new: Tokens, scores: torch.Tensor | None, fold: Fold | None
    ) -> torch.Tensor | None:
        """Let new tokens compete with those in the slots; the scores of who is left."""
        assert self.slots is not None
        old = self.slots.read()
        pool = new if old is None else Tokens.join([old, new])
        size = pool.columns.shape[2]
        padding = 0 if self.padding is None else self.padding[:, None, None]
        worth = pool.columns.float() if scores is None else scores[:, :, :size]
        place, age = pool.columns - padding, self.length - 1 - pool.columns
        priority = self.policy.priority(worth, place, age)
        source, kept = self.slots.admit(pool, priority.masked_fill(pool.columns < 0, float("-inf")))
        if fold is not None:
            _hand_on(pool, ~kept & (pool.columns >= 0), fold)
        if scores is None:
            return None
        return torch.cat([worth.gather(2, source), scores[:, :, size:]], 2)

    def _shown(self, tokens: Tokens) -> Tokens:
        """Without padding, and without sinks of padded rows, which are kept elsewhere."""
        if self.padding is None:
            return tokens
        return tokens.only(tokens.columns - self.padding[:, None, None] >= self.spec.sinks)

    # -- reading ----------------------------------------------------------------------------------

    def parts(self, tiles: tuple[bool, bool] = (False, False)) -> list[Tokens]:
        """Tokens from before the step in hand: sinks, slots, recent, those that there are.

        Args:
            tiles: whether keys, values of the slots may leave in tile order.
        """
        if self.recent is None or self.slots is None:
            return []
        before = self.length - (0 if self.pending is None else self.pending[0].shape[2])
        if before == 0:
            return []
        parts = [self._sinks(before), self.slots.read(tiles)]
        if (held := before - self.start) > 0:
            k, v = (x[:, :, :held] for x in self.recent)
            parts.append(self._shown(Tokens.at(k, v, self.start)))
        return [p for p in parts if p is not None]

    def kept(self) -> Tokens | None:
        """The tokens of all `parts`, None for none."""
        parts = self.parts()
        return Tokens.join(parts) if parts else None

    def _sinks(self, before: int) -> Tokens | None:
        assert self.sinks is not None
        k, v = self.sinks
        if self.padding is None:
            some = Tokens.at(k, v, 0).first(min(self.spec.sinks, before))
        else:
            own = sink_columns(self.padding, self.spec.sinks)[:, None].expand(-1, k.shape[1], -1)
            some = Tokens(k, v, own).only(own < before)
        return some if some.columns.shape[2] else None

    # -- rearranging ------------------------------------------------------------------------------

    def map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a row selection or repetition to every stored tensor.

        Args:
            change: maps a tensor [B, ...] to [B', ...].
        """
        if self.recent is None or self.sinks is None or self.slots is None:
            return
        self.sinks = (change(self.sinks[0]), change(self.sinks[1]))
        self.recent = (change(self.recent[0]), change(self.recent[1]))
        self.slots.map_rows(change)
        self.scores = None if self.scores is None else change(self.scores)
        self.padding = None if self.padding is None else change(self.padding)
        if self.state is not None:
            self.state.map_rows(change)

    def crop(self, length: int) -> None:
        """Forget the tokens from column `length` on, where that can be done as if they never came.

        Raises:
            ValueError: tokens were evicted for their sake, or the scores count their queries.
        """
        if length >= self.length:
            return
        if length <= 0:
            self.clear()
            return
        if self.policy.scored or length < self.start:
            least = self.length if self.policy.scored else self.start
            what = f"length under eviction {self.policy.kind}"
            remedy = "Evicted tokens cannot come back; generate without assistant or prompt lookup."
            raise ValueError(explain("cache.crop", what, f"at least {least}", length, remedy))
        self.length = length

    # -- counting ---------------------------------------------------------------------------------

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every allocated tensor as (body | windows | parameters | eviction | state, tensor)."""
        for pair in (self.sinks, self.recent, self.pending):
            yield from (("windows", t) for t in pair or ())
        if self.slots is not None:
            yield from (("body", t) for t in self.slots.tensors())
            yield "eviction", self.slots.columns
        if self.scores is not None:
            yield "eviction", self.scores
        for codec in self.codecs:
            yield from (("parameters", t) for t in codec.tensors())
        if self.state is not None:
            yield from self.state.tensors()


def _hand_on(pool: Tokens, lost: torch.Tensor, fold: Fold) -> None:
    """Give the lost tokens of a pool to `fold`, as many places as the head with most needs."""
    most = int(lost.sum(-1).max())
    if most:
        order = lost.int().sort(dim=-1, descending=True, stable=True).indices[:, :, :most]
        fold(pool.take(order).only(lost.gather(2, order)))
