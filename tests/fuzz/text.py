"""Damage of bytes, of JSON text and of plain data."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**53 + 1, 2**63, 2**64, 10**40, -(10**300), 10**400),
    *(0.5, -0.0, 1e-320, 1e308, -1e308, "", "nuq", "x" * 5000, "\u0000", "\u202e", "../x"),
    *([], [1], [[[]]], [None] * 9, [0] * 2000, {}, {"kind": "nuq"}, {"": {}}, {"a": [{"b": 1.5}]}),
)
_LITERALS: tuple[bytes, ...] = (
    *(b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1e-999", b"0x10", b"01", b"+1"),
    *(b"9" * 4000, b"9" * 5000, b"-" + b"9" * 100_000, b"0." + b"1" * 10_000, b"1E400000000"),
    *(b"[" * 40 + b"]" * 40, b"[" * 30 + b"]" * 30, b"[" * 2000, b'{"a":' * 100_000, b"{}", b"[]"),
    *(b'"\\ud800"', b'"\\udc00\\ud800"', b'"\xff"', b'"\xc0\x80"', b'"\xed\xa0\x80"', b'"\\u0000"'),
    *(b'"\\', b'"', b"'a'", b"", b" ", b"null", b"true", b"1 2", b"1,", b"//", b"\xef\xbb\xbf1"),
)
_VALUE = re.compile(rb'(?<=[:\[,])\s*("(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null)')
_PAIR = re.compile(rb'"(?:[^"\\]|\\.)*"\s*:\s*(?:"(?:[^"\\]|\\.)*"|-?[0-9.eE+-]+|null|\{\}|\[\])')


def mangled(data: bytes, rng: random.Random) -> bytes:
    """One to four small edits of bytes."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        i, j = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
        kind = rng.randrange(7)
        if kind == 0 and i < len(raw):
            raw[i] ^= 1 << rng.randrange(8)
        elif kind == 1 and i < len(raw):
            raw[i] = rng.choice(b'\x00\xff\x7f{}[]",:0919 eE-.\\\n')
        elif kind == 2:
            raw[i:i] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 3:
            del raw[i : i + rng.randrange(1, 40)]
        elif kind == 4:
            del raw[i:]
        elif kind == 5:
            raw[i:i] = raw[i:j]
        else:
            raw[i:j] = raw[i:j][::-1]
    return bytes(raw)


def reworded(raw: bytes, rng: random.Random) -> bytes:
    """JSON text in which one thing is written as no honest writer writes it."""
    kind = rng.randrange(8)
    values, pairs = list(_VALUE.finditer(raw)), list(_PAIR.finditer(raw))
    if kind <= 3 and values:
        spot = rng.choice(values)
        return raw[: spot.start(1)] + rng.choice(_LITERALS) + raw[spot.end(1) :]
    if kind == 4 and pairs:  # a key twice
        pair = rng.choice(pairs)
        return (
            raw[: pair.end()] + b", " + rng.choice((pair, rng.choice(pairs)))[0] + raw[pair.end() :]
        )
    if kind == 5:
        around = rng.choice(((b"\xef\xbb\xbf", b""), (b"[", b"]"), (b"", b"{}"), (b"", b"\x00")))
        return around[0] + raw + around[1]
    if kind == 6:
        return raw.decode("latin-1").encode(rng.choice(("utf-16", "utf-32-le", "utf-7")))
    return raw.replace(b"{", b"{" + rng.choice((b" \t\r\n", b"\x0b", b"\xa0", b"/**/")), 1)


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value, at any depth."""
    keys = data.keys() if isinstance(data, dict) else range(len(data))
    for key in list(keys):
        yield data, key
        if isinstance(data[key], (dict, list)):
            yield from places(data[key])


def mutate_value(data: Any, rng: random.Random) -> None:
    """Replace, drop, rename, or exchange one or two values of plain data."""
    for _ in range(rng.choice((1, 1, 2))):
        found = list(places(data))
        if not found:
            return
        (container, key), (other, place) = rng.choice(found), rng.choice(found)
        kind = rng.randrange(6)
        if kind <= 2:
            container[key] = json.loads(json.dumps(rng.choice(JUNK)))
        elif kind == 3:
            container[key] = json.loads(json.dumps(other[place]))
        elif kind == 4 and isinstance(container, dict):
            container[key + rng.choice("s_ ")] = container.pop(key)
        elif isinstance(container, list):
            container.append(container[key])
        else:
            del container[key]
