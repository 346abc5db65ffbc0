"""RoPE of the stored keys of one layer, as attention calls for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvsmith.pairing import Pairing
from kvsmith.rope import Positions, RotarySource, Rotate, TableSource

# Positions between two entries of the coarse one of two tables.
FINE = 256


@dataclass(frozen=True)
class KeyRotation:
    """Rotates stored keys; see `attention.Rotation`.

    Args:
        positions: position ids of the columns.
        source: makes cos and sin; None where nothing is to be rotated.
        dtype: of cos and sin.
        rotate: the model's rotary function.
        pairing: its pairs, in whose order the channels of stored keys lie; None for natural order
            and a function that is known by nothing but itself.
    """

    positions: Positions
    source: RotarySource | TableSource | None
    dtype: torch.dtype
    rotate: Rotate | None
    pairing: Pairing | None

    @property
    def pairs_halves(self) -> bool:
        """Whether channels d and d + D/2 turn together, or nothing turns."""
        return self.source is None or self.pairing is not None

    def __call__(
        self, k: torch.Tensor, start: int | None, columns: torch.Tensor | None
    ) -> torch.Tensor:
        """Rotate [B, H, C, D] at columns start, start + 1, ... or at `columns` [B, C]."""
        if self.source is None or self.rotate is None:
            return k
        stop = 0 if start is None else start + k.shape[2]
        cos, sin = self.positions.cos_sin(self.source, self.dtype, start, stop, columns, k.device)
        if self.pairing is None:
            return self.rotate(k, cos, sin).to(k.dtype)
        turned = self.rotate(self.pairing.natural(k), cos, sin).to(k.dtype)
        return self.pairing.arranged(turned)

    def tiles(
        self, k: torch.Tensor, start: int | None, columns: torch.Tensor | None, order: torch.Tensor
    ) -> torch.Tensor:
        """Rotate [B, H, C, D] float32 in tile order, in place; see `attention.Rotation`."""
        if self.source is None:
            return k
        # Every channel of the lower half is followed by its partner.
        lower = order[::2]
        if start is None:
            assert columns is not None
            shared = columns.stride(1) == 0  # all heads have the same
            angles = self._angles_at(columns[:, :1] if shared else columns, lower)
        else:
            angles = self._angles(start, k.shape[2], k.device)[:, None].index_select(-1, lower)
        pairs = torch.view_as_complex(k.unflatten(-1, (-1, 2)))
        pairs *= angles
        return k

    def _angles_at(self, columns: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
        """cos + i sin [B, H, C, D/2] complex64 of `columns` [B, H, C], pairs as `lower` says.

        On a CPU by tables of every 256th position and of those between.
        """
        positions, source, pairing = self.positions, self.source, self.pairing
        assert source is not None and pairing is not None
        flat, device = columns.flatten(1), columns.device
        if positions.epochs or device.type != "cpu":
            rope = positions.cos_sin(source, self.dtype, None, 0, flat, device)
            return pairing.turns(rope).index_select(-1, lower).view(*columns.shape, -1)
        most = int(positions.every().max()) // FINE + 1
        coarse = positions.shared(
            ("coarse", source, most), lambda: _table(source, pairing, FINE, most, device)
        )
        fine = positions.shared(
            ("steps", source, FINE, device), lambda: _steps(source, pairing, FINE, device)
        )
        ids = positions.at(flat).flatten()
        turns = coarse[:, lower].index_select(0, ids // FINE)
        turns *= fine[:, lower].index_select(0, ids % FINE)
        return turns.view(*columns.shape, -1)

    def _angles(self, start: int, count: int, device: torch.device) -> torch.Tensor:
        """cos + i sin [rows, count, D/2] complex64 of the columns from `start` on.

        Position p + t turns by the angle of p, then by that of t: where positions count up by one,
        cosines are made for the first of them and for a table of t alone.
        """
        positions, source, pairing = self.positions, self.source, self.pairing
        assert source is not None and pairing is not None
        ids = positions.window(start, start + count)
        if positions.epochs or not bool((ids.diff(dim=1) == 1).all()):
            stop = start + count
            return pairing.turns(positions.cos_sin(source, self.dtype, start, stop, None, device))
        first = positions.shared(
            ("first", source, start, device),
            lambda: pairing.turns(source(ids[:, :1], torch.float32)).to(device),
        )
        steps = positions.shared(
            ("steps", source, count, device),
            lambda: _steps(source, pairing, count, ids.device).to(device),
        )
        return first * steps


def _table(
    source: RotarySource | TableSource,
    pairing: Pairing,
    step: int,
    count: int,
    device: torch.device,
) -> torch.Tensor:
    """cos + i sin [C, D/2] complex64 of positions 0, step, 2 step, ..."""
    ids = torch.arange(0, step * count, step, device=device)[None]
    return pairing.turns(source(ids, torch.float32))[0]


def _steps(
    source: RotarySource | TableSource, pairing: Pairing, count: int, device: torch.device
) -> torch.Tensor:
    """Turns by 0, 1, 2, ... positions, [C, D/2] complex64."""
    turns = _table(source, pairing, 1, count, device)
    # YaRN scales cos and sin; position 0 is that scale.
    return turns / turns[:1]
