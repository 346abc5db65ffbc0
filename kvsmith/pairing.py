"""Which channels of a key RoPE turns together, and an order of channels in which every RoPE is
half-split over the whole head.

Models pair channels d and d + D/2 (Llama), 2d and 2d + 1 (Cohere), or do either in the first
channels of a head alone (Phi, GLM). Attention sums over channels, so their order is free where
queries, keys and the tables of the codec share it. With the lower channels of all pairs first and
their partners behind them, unturned channels paired at frequency 0, one rotation serves all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from kvsmith.rope import CosSin, Rotate


@dataclass(frozen=True, eq=False)
class Pairing:
    """Pairs of channels of a key head.

    Attributes:
        order: [D] int64, channel at each place when paired ones lie D/2 apart; None where they do.
        place: [D] int64, its inverse; None likewise.
        entry: [D/2] int64, entry of cos and sin that turns each pair; one past the last for pairs
            that nothing turns.
    """

    order: torch.Tensor | None
    place: torch.Tensor | None
    entry: torch.Tensor

    def arranged(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] from natural order to that of the pairs."""
        return x if self.order is None else x.index_select(-1, self.order)

    def natural(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] from the order of the pairs to natural order."""
        return x if self.place is None else x.index_select(-1, self.place)

    def of(self, entries: torch.Tensor, unturned: float) -> torch.Tensor:
        """[..., width] to [..., D/2]: what belongs to each pair."""
        padded = F.pad(entries, (0, 1), value=unturned)
        return padded.index_select(-1, self.entry.to(entries.device))

    def turns(self, rope: CosSin) -> torch.Tensor:
        """cos + i sin of each pair, [rows, C, D/2] complex64, from [rows, C, width]."""
        return torch.complex(self.of(rope[0].float(), 1.0), self.of(rope[1].float(), 0.0))


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # it outlives the call, and may meet gradients later
@torch.no_grad()
def find_pairing(rotate: Rotate, dim: int, width: int, device: torch.device) -> Pairing | None:
    """The pairs that a rotary function turns, found by having it turn each channel alone.

    Args:
        rotate: see `rope.rotation_function`.
        dim: channels of a head D.
        width: entries of cos and sin.
        device: where the answer is wanted.

    Returns:
        None for a function that does something else.
    """
    # Said in full, since torch's defaults may be others.
    angle = torch.linspace(0.2, 1.2, width, dtype=torch.float32, device="cpu")
    cos, sin = (x.expand(1, dim, -1) for x in (angle.cos(), angle.sin()))
    channels = torch.eye(dim, dtype=torch.float32, device="cpu")
    turned = rotate(channels[None, None], cos, sin)[0, 0]
    # Channel a of the lower ones gives its partner a sine, which takes it back with a minus.
    own = turned.diagonal()
    across = turned - own.diag()
    lower, still = (across > 1e-3).any(1).nonzero()[:, 0], (own == 1).nonzero()[:, 0]
    upper = across[lower].argmax(1)
    count = len(still) // 2
    every = torch.cat([lower, still[:count], upper, still[count:]])
    if not torch.equal(every.sort().values, torch.arange(dim, device="cpu")):
        return None
    # Which entry gave the cosine, of angles that all differ.
    a, b = ((own[x, None] - angle.cos()).abs().argmin(1) for x in (lower, upper))
    expected = own.diag()
    expected[lower, lower], expected[upper, lower] = angle[a].cos(), -angle[a].sin()
    expected[upper, upper], expected[lower, upper] = angle[b].cos(), angle[b].sin()
    if not torch.allclose(turned, expected, rtol=0, atol=1e-5):
        return None
    entry = F.pad(a, (0, count), value=width)
    natural = torch.equal(every, torch.arange(dim, device="cpu"))
    order, place = (None, None) if natural else (every.to(device), every.argsort().to(device))
    return Pairing(order, place, entry.to(device))
