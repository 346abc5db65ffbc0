"""RoPE of the stored keys of one layer, as attention calls for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from kvsmith.rope import CosSin, Positions, RotarySource, Rotate, TableSource


@lru_cache(maxsize=256)
def turns_halves(rotate: Rotate, dim: int) -> bool:
    """Whether a rotary function turns channels d and d + D/2 together, all of them.

    Args:
        rotate: see `rope.rotation_function`.
        dim: channels of a head D; cos and sin are as wide.
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randn((1, 1, 2, dim), generator=draw)
    angle = torch.randn((1, 2, dim // 2), generator=draw)
    cos, sin = angle.cos().repeat(1, 1, 2), angle.sin().repeat(1, 1, 2)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    return torch.allclose(rotate(x, cos, sin), expected, atol=1e-5)


@dataclass(frozen=True)
class KeyRotation:
    """Rotates stored keys; see `attention.Rotation`.

    Args:
        positions: position ids of the columns.
        source: makes cos and sin; None where nothing is to be rotated.
        dtype: of cos and sin.
        rotate: the model's rotary function.
        pairs_halves: whether `tiles` may be called.
    """

    positions: Positions
    source: RotarySource | TableSource | None
    dtype: torch.dtype
    rotate: Rotate | None
    pairs_halves: bool

    def __call__(
        self, k: torch.Tensor, start: int | None, columns: torch.Tensor | None
    ) -> torch.Tensor:
        """Rotate [B, H, C, D] at columns start, start + 1, ... or at `columns` [B, C]."""
        if self.source is None or self.rotate is None:
            return k
        stop = 0 if start is None else start + k.shape[2]
        cos, sin = self.positions.cos_sin(self.source, self.dtype, start, stop, columns, k.device)
        return self.rotate(k, cos, sin).to(k.dtype)

    def tiles(self, k: torch.Tensor, start: int, order: torch.Tensor) -> torch.Tensor:
        """Rotate [B, H, C, D] float32 in tile order, in place."""
        if self.source is None:
            return k
        # Every channel of the lower half is followed by its partner.
        angles = self._angles(start, k.shape[2], k.device).index_select(-1, order[::2])
        pairs = torch.view_as_complex(k.unflatten(-1, (-1, 2)))
        pairs *= angles[:, None]
        return k

    def _angles(self, start: int, count: int, device: torch.device) -> torch.Tensor:
        """cos + i sin [rows, count, D/2] complex64 of the columns from `start` on.

        Position p + t turns by the angle of p, then by that of t: where positions count up by one,
        cosines are made for the first of them and for a table of t alone.
        """
        positions, source = self.positions, self.source
        assert source is not None
        ids = positions.window(start, start + count)
        if positions.epochs or not bool((ids.diff(dim=1) == 1).all()):
            stop = start + count
            return _complex(positions.cos_sin(source, self.dtype, start, stop, None, device))
        first = positions.shared(
            ("first", source, start, device),
            lambda: _complex(source(ids[:, :1], torch.float32)).to(device),
        )
        steps = positions.shared(
            ("steps", source, count, device), lambda: _steps(source, ids[:1]).to(device)
        )
        return first * steps


def _steps(source: RotarySource | TableSource, ids: torch.Tensor) -> torch.Tensor:
    """Turns by 0, 1, 2, ... positions, [1, C, D/2] complex64, for `ids` [1, C]."""
    turns = _complex(source(torch.arange(ids.shape[1], device=ids.device)[None], torch.float32))
    # YaRN scales cos and sin; position 0 is that scale.
    return turns / turns[:, :1]


def _complex(rope: CosSin) -> torch.Tensor:
    """cos + i sin of the lower half of the channels."""
    half = rope[0].shape[-1] // 2
    return torch.complex(*(x[..., :half].float() for x in rope))
