"""Layers over several devices, in order and evenly, as `device_map=auto` does."""

from __future__ import annotations

from dataclasses import replace

from kvsmith.errors import explain
from kvsmith.geometry import ModelGeometry
from kvsmith.spec import CacheSpec


def spread(shape: ModelGeometry, devices: int) -> tuple[range, ...]:
    """The layers of each device; a layer is on its owner's.

    Raises:
        ValueError: there are more devices than layers that may lie apart.
    """
    count = len(shape.layers)
    cuts = [i for i in range(1, count) if all(o >= i for o in shape.owner[i:])]
    if not 1 <= devices <= len(cuts) + 1:
        expected = f"between 1 and {len(cuts) + 1}, since layers stay whole and with their owners"
        raise ValueError(explain("devices", "value", expected, devices))
    ends = [0]
    for i in range(1, devices):
        later = devices - 1 - i  # cuts that must be left
        free = [c for n, c in enumerate(cuts) if c > ends[-1] and len(cuts) - 1 - n >= later]
        ends.append(min(free, key=lambda c: abs(c - i * count / devices)))
    return tuple(range(a, b) for a, b in zip(ends, [*ends[1:], count], strict=True))


def part_of(shape: ModelGeometry, layers: range) -> ModelGeometry:
    """A range of layers alone."""
    a, b = layers.start, layers.stop
    return ModelGeometry(shape.layers[a:b], tuple(o - a for o in shape.owner[a:b]))


def spec_of(spec: CacheSpec, layers: range) -> CacheSpec:
    """The cache of a range of layers alone.

    Raises:
        ValueError: states have ranks of their own by layer.
    """
    if spec.less is not None:
        expected = "1 for a cache with a state"
        raise ValueError(explain("devices", "value", expected, "several"))
    if not spec.codec.layers:
        return spec
    own = (c for c in spec.codec.layers if c.layer in layers)
    moved = tuple(replace(c, layer=c.layer - layers.start) for c in own)
    return replace(spec, codec=replace(spec.codec, layers=moved))
