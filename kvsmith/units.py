"""Counts and sizes as people write them: `200k` and `1M` tokens, `20GiB` and `80GB` of memory."""

from __future__ import annotations

import re

from kvsmith.errors import explain

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_FACTORS |= {"t": 10**12, "ti": 2**40}
_WRITTEN = re.compile(r"(\d+(?:[._]\d+)*)\s*([kmgt]?i?)(b?)", re.IGNORECASE)


def parse_count(text: str | int, where: str) -> int:
    """A number of tokens.

    Args:
        text: `131072`, `200k` (thousands), `1M` (millions), `128Ki` (times 1024), `1.5M`.
        where: configuration path, for errors.

    Returns:
        The number, positive.

    Raises:
        ValueError: anything else; one line.
    """
    return _parse(text, where, "a number of tokens such as 131072, 200k or 1M", bytes_=False)


def parse_bytes(text: str | int, where: str) -> int:
    """A number of bytes.

    Args:
        text: `20GiB` (times 2^30), `80GB` (times 10^9), or a whole number.
        where: configuration path, for errors.

    Returns:
        The number, positive.

    Raises:
        ValueError: anything else; one line.
    """
    return _parse(text, where, "a size such as 20GiB or 80GB", bytes_=True)


def show_bytes(count: float) -> str:
    """A size in GB (10^9 bytes), MB or kB with three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return (
                f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} GB"
            )
    return f"{count:.0f} B"


def show_count(count: int) -> str:
    """A number of tokens with a unit: 1.25M, 200k, 512."""
    for unit, size in (("M", 10**6), ("k", 10**3)):
        if count >= size:
            digits = f"{count / size:.4g}" if count < 1000 * size else f"{count / size:,.0f}"
            return f"{digits}{unit}"
    return str(count)


def _parse(text: str | int, where: str, expected: str, bytes_: bool) -> int:
    found = _WRITTEN.fullmatch(str(text).strip()) if type(text) in (str, int) else None
    if found is not None and (bytes_ or not found[3]) and found[2].lower() in _FACTORS:
        number = float(found[1].replace("_", "")) * _FACTORS[found[2].lower()]
        if number >= 1 and number == int(number):
            return int(number)
    raise ValueError(explain(where, "value", expected, repr(text)))
