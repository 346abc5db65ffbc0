"""How one encoded tensor (keys or values) is laid out, in numbers that a kernel needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

OutlierRule = Literal["none", "threshold", "error", "extremes"]


@dataclass(frozen=True)
class Format:
    """Static facts of an encoded tensor.

    Attributes:
        bits: code width.
        axis: whose range it is, "channel" or "token".
        group: axis "token": channels per range, 0 for the whole token; axis "channel": tokens per
            range, 0 for calibrated ranges.
        slots: outliers stored a token, N; `block * slots` stand together, ordered by head.
        block: tokens that are encoded together.
        outliers: "threshold" corrects elements beyond the calibrated range, "error" those coded
            worst, "extremes" the largest and smallest elements of a token (axis "token") or of a
            channel in a block (axis "channel"), "none" nothing.
        store: dtype of online ranges and corrections.
        channel_slots: outliers of a channel in a block under the rule "extremes" of axis "channel";
            slots of a block that this leaves over hold a correction of 0.
    """

    bits: int
    axis: Literal["channel", "token"]
    group: int
    slots: int
    outliers: OutlierRule
    store: torch.dtype
    block: int = 16
    channel_slots: int = 0


@dataclass(frozen=True)
class Factors:
    """How the low-rank factors of an encoded tensor are stored.

    Attributes:
        block: tokens that share factors.
        iterations: subspace iterations that find them.
        bits: width of their elements, 0 for `store`.
        store: dtype of the elements, or of their scales.
    """

    block: int
    iterations: int
    bits: int
    store: torch.dtype


def index_dtype(largest: int) -> torch.dtype:
    """Smallest dtype for unsigned integers up to `largest` < 65536; int16 is read as unsigned."""
    return torch.uint8 if largest < 256 else torch.int16


def unsigned(stored: torch.Tensor) -> torch.Tensor:
    """int64 values of a tensor stored as `index_dtype`."""
    return stored.long() if stored.dtype == torch.uint8 else stored.long() & 0xFFFF


@dataclass(frozen=True)
class Tables:
    """Tensors that all tokens share.

    Attributes:
        lut: [C] float32, normalised value of each code, increasing.
        edges: [C - 1] float32, normalised boundaries between codes.
        scale: [H, D] float32, calibrated half width of each channel; None for online ranges.
        zero: [H, D] float32, calibrated centre of each channel; None for online ranges.
        uniform: whether lut is equally spaced from -1 to 1.
    """

    lut: torch.Tensor
    edges: torch.Tensor
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    uniform: bool = False

    def to(self, device: torch.device) -> Tables:
        """The same tables on another device."""
        scale, zero = (None if t is None else t.to(device) for t in (self.scale, self.zero))
        return Tables(self.lut.to(device), self.edges.to(device), scale, zero, self.uniform)

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(t.nbytes for t in (self.lut, self.edges, self.scale, self.zero) if t is not None)
