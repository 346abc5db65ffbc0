"""JSON from a stranger: bounded size and depth, no duplicate keys, finite numbers, UTF-8."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from kvsmith.bundle.errors import printable, refuse

DAMAGED = "The file is damaged; copy, download or export the bundle again."
DEPTH = 32
# Possessive, and the closing quote optional: one pass whatever the bytes are.
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


def read_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        raw: the whole text; its size has been checked.
        where: file that errors name.

    Returns:
        Plain data; every float is finite.

    Raises:
        BundleError: not UTF-8, not JSON, deeper than 32 levels, a key twice, or not an object.
    """
    if (depth := _depth(raw)) > DEPTH:
        raise refuse(where, "nesting", f"at most {DEPTH} levels deep", depth)
    try:
        data = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        json.dumps(data, ensure_ascii=False).encode()  # an escape may name half a character
    except (ValueError, RecursionError) as error:
        raise refuse(
            where, "file", "valid JSON", f"({printable(str(error), 120)})", DAMAGED
        ) from None
    if not isinstance(data, dict):
        raise refuse(where, "file", "a JSON object", type(data).__name__, DAMAGED)
    return data


def _depth(raw: bytes) -> int:
    deepest = depth = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", raw)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise ValueError(f"key {key[:40]!r} occurs twice")
        data[key] = value
    return data


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large")
    return value
