"""Accelerators by name, with their makers' figures.

Memory is the maker's number in 10^9 bytes; a device reports up to 7 % more, so a plan errs on the
safe side. Bandwidth is the maker's peak; copies reach 85 to 93 % of it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from kvsmith.errors import explain


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: as in `DEVICES`.
        memory: bytes.
        bandwidth: peak of its memory, bytes a second.
    """

    name: str
    memory: int
    bandwidth: float


# name -> GB, GB a second
_FIGURES = {
    "a10g": (24, 600),
    "a100-40gb": (40, 1555),
    "a100": (80, 2039),
    "a6000": (48, 768),
    "b200": (180, 7700),
    "b300": (270, 7700),
    "gh200": (96, 4000),
    "h100": (80, 3350),
    "h100-pcie": (80, 2000),
    "h200": (141, 4800),
    "l4": (24, 300),
    "l40s": (48, 864),
    "mi250x-gcd": (64, 1638),
    "mi300x": (192, 5300),
    "mi325x": (256, 6000),
    "mi355x": (288, 8000),
    "rtx3090": (24, 936),
    "rtx4090": (24, 1008),
    "rtx5090": (32, 1792),
    "rtx6000-ada": (48, 960),
    "rtx-pro-6000": (96, 1792),
    "t4": (16, 320),
    "v100": (32, 900),
}
DEVICES = {n: Device(n, gb * 10**9, speed * 1e9) for n, (gb, speed) in _FIGURES.items()}


def device_by_name(name: str, where: str = "device") -> Device:
    """Look a device up; upper case and spaces do not matter.

    Args:
        name: for example `h200`.
        where: configuration path, for errors.

    Raises:
        ValueError: unknown; lists the known.
    """
    key = name.lower().replace(" ", "-")
    found = DEVICES.get(key) or DEVICES.get(key.replace("-", ""))
    if found is None:
        close = difflib.get_close_matches(key, DEVICES, n=2)
        remedy = f"Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(
            explain(where, "value", f"one of {', '.join(DEVICES)}", repr(name), remedy)
        )
    return found
