"""What a plan is asked, and what it says; `planner.py` is the arithmetic between the two."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvsmith.devices import Device
from kvsmith.errors import explain
from kvsmith.geometry import ModelGeometry
from kvsmith.spec import CacheSpec

RESERVE = 0.06  # share of a device: driver, allocator, fragments
PREFILL = 2048  # tokens of a prompt that go through the model at once


@dataclass(frozen=True)
class ModelFacts:
    """What a plan needs of a model.

    Attributes:
        name: word for tables.
        geometry: layers that keep keys and values.
        rope: whether keys are rotated by position.
        weights: parameters, all.
        read: parameters that a decoding step reads: all but an input embedding of its own.
        hidden, inner, vocab: widths of the residual stream, the feed-forward layer, the logits.
        positions: the longest context it was made for; None where it has no limit.
        fixed: layers whose state does not grow with the context (linear attention, Mamba).
    """

    name: str
    geometry: ModelGeometry
    rope: bool
    weights: int
    read: int
    hidden: int
    inner: int
    vocab: int
    positions: int | None
    fixed: int = 0


@dataclass(frozen=True)
class Load:
    """What is asked of a device.

    Attributes:
        context: tokens of each row.
        batch: rows.
        dtype: of weights, activations and dense tokens.
        prefill: tokens of a prompt that go through the model at once.
        reserve: share of the device's memory that is left alone, in [0, 1).
        devices: equal ones that layers are spread over, in order.
    """

    context: int
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    prefill: int = PREFILL
    reserve: float = RESERVE
    devices: int = 1

    def __post_init__(self) -> None:
        for name in ("context", "batch", "prefill", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(explain(name, "value", "positive", getattr(self, name)))
        if not 0 <= self.reserve < 1:
            raise ValueError(explain("reserve", "share of memory", "in [0, 1)", self.reserve))


@dataclass(frozen=True)
class Option:
    """One cache on the device.

    Attributes:
        codec: its name.
        spec: what it is.
        bits: 8 * cache over the key and value elements of all tokens; below the codec's where
            sliding windows drop tokens.
        bytes_per_token: bytes that one more token of a row takes, at any length.
        cache: bytes of all rows at the context.
        read: bytes of the cache that one decoding step reads at the context, all rows.
        seconds: floor of a decoding step.
        longest: tokens a row may have with this batch, 0 where not even one fits.
        rows: rows that fit at the context.
        fits: whether what was asked for fits.
        fullest: bytes of weights, activations and cache on the device that has most of them.
    """

    codec: str
    spec: CacheSpec
    bits: float
    bytes_per_token: float
    cache: int
    read: int
    seconds: float
    longest: int
    rows: int
    fits: bool
    fullest: int


@dataclass(frozen=True)
class Plan:
    """A model on a device, or on several.

    Attributes:
        model, device, load: what was asked.
        factor: layers that share one owner's tokens; 1 as the model is.
        weights: bytes, of all devices.
        activations, reserve: bytes, of each device.
        room: bytes left for the cache on all devices; negative where the weights alone do not fit.
        options: one a codec, in the order given.
        notes: what a reader must know, a sentence each.
    """

    model: ModelFacts
    device: Device
    load: Load
    factor: int
    weights: int
    activations: int
    reserve: int
    room: int
    options: tuple[Option, ...]
    notes: tuple[str, ...]

    def __getitem__(self, codec: str) -> Option:
        """The option of a codec.

        Raises:
            KeyError: it is not in the plan.
        """
        for option in self.options:
            if option.codec == codec:
                return option
        raise KeyError(codec)
