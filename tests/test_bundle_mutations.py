"""Thousands of damaged bundles: each is refused by a BundleError or loads what it says.

"Honest" damage leaves the checksums alone, and must never change what is loaded. "Sealed" damage
is an attacker's: hashes, sizes and the checksum are made to fit, so that the deeper checks see it.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kvsmith
from kvsmith.bundle import Bundle, BundleError
from kvsmith.bundle.manifest import CARD, MANIFEST, SHARD, seal, write_manifest
from kvsmith.bundle.tensors import check_parameters
from kvsmith.strict import to_dict
from tests.golden import GOLDEN, contents, copy_golden

ROUNDS = 500
SECONDS = 20.0
MEMORY = 256 * 2**20  # growth of the peak, bytes
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**40, 0.5, -0.0, 1e-320, 1e308),
    *("", "nuq", "x" * 5000, "\u0000", "\u202e", "../x", [], [1], [[[]]], {}, {"kind": "nuq"}),
)

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def golden() -> Bundle:
    return kvsmith.load(GOLDEN)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four small edits."""
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
            container[key] = rng.choice(JUNK)
        elif kind == 3:
            container[key] = json.loads(json.dumps(other[place]))
        elif kind == 4 and isinstance(container, dict):
            container[key + rng.choice("s_ ")] = container.pop(key)
        elif isinstance(container, list):
            container.append(container[key])
        else:
            del container[key]


def resealed(raw: bytes) -> bytes:
    """Make the checksum of a mangled manifest fit, where it still has one."""
    start = raw.find(b'"checksum": "') + 13
    zeros = b"0" * 64
    blank = raw[:start] + zeros + raw[start + 64 :]
    return raw[:start] + hashlib.sha256(blank).hexdigest().encode() + raw[start + 64 :]


def with_shard(files: Files, shard: bytes) -> Files:
    data = json.loads(files[MANIFEST])
    data["files"][SHARD] = {"sha256": hashlib.sha256(shard).hexdigest(), "size": len(shard)}
    del data["checksum"]
    return {**files, SHARD: shard, MANIFEST: seal(data)}


def one_file(files: Files, rng: random.Random) -> Files:
    name = rng.choice((MANIFEST, SHARD, CARD))
    return {**files, name: mutate_bytes(files[name], rng)}


def sealed_manifest_bytes(files: Files, rng: random.Random) -> Files:
    return {**files, MANIFEST: resealed(mutate_bytes(files[MANIFEST], rng))}


def sealed_manifest_values(files: Files, rng: random.Random) -> Files:
    data = json.loads(files[MANIFEST])
    del data["checksum"]
    mutate_value(data, rng)
    return {**files, MANIFEST: seal(data)}


def sealed_shard_bytes(files: Files, rng: random.Random) -> Files:
    return with_shard(files, mutate_bytes(files[SHARD], rng))


def sealed_header(files: Files, rng: random.Random) -> Files:
    raw = files[SHARD]
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    mutate_value(header, rng)
    text = json.dumps(header).encode()
    return with_shard(files, len(text).to_bytes(8, "little") + text + raw[end:])


def sealed_numbers(files: Files, rng: random.Random) -> Files:
    raw = bytearray(files[SHARD])
    start = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(rng.choice((1, 3, 30))):
        raw[rng.randrange(start, len(raw))] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return with_shard(files, bytes(raw))


@pytest.mark.parametrize(
    ("mutate", "honest", "least"),
    [
        (one_file, True, 0.99),
        (sealed_manifest_bytes, False, 0.5),
        (sealed_manifest_values, False, 0.5),
        (sealed_shard_bytes, False, 0.5),
        (sealed_header, False, 0.9),
        (sealed_numbers, False, 0.1),
    ],
)
def test_damage_is_refused_or_harmless(
    mutate: Callable[[Files, random.Random], Files],
    honest: bool,
    least: float,
    golden: Bundle,
    tmp_path: Path,
) -> None:
    rng, files = random.Random(mutate.__name__), contents(GOLDEN)
    folder = copy_golden(tmp_path / "b")
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for round in range(ROUNDS):
        damaged = mutate(files, rng)
        for name, data in damaged.items():
            (folder / name).write_bytes(data)
        try:
            bundle = kvsmith.load(folder)
        except BundleError as error:
            assert str(error).isprintable() and len(str(error)) < 1200, round
            refused += 1
            continue
        if honest:
            assert equal(bundle, golden), round
        else:
            assert consistent(bundle, damaged), round
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert refused >= least * ROUNDS, f"{refused} of {ROUNDS} refused"
    assert time.process_time() - start < SECONDS and grown < MEMORY


def equal(bundle: Bundle, golden: Bundle) -> bool:
    same = bundle.manifest == golden.manifest and bundle.card == golden.card
    return same and all(torch.equal(t, golden.parameters[n]) for n, t in bundle.parameters.items())


def consistent(bundle: Bundle, files: Files) -> bool:
    """What was loaded is what the manifest says, can be used, and can be written."""
    data = json.loads(files[MANIFEST])
    data.pop("checksum")
    manifest = bundle.manifest
    check_parameters(manifest.cache, manifest.base_model.geometry, bundle.parameters, "loaded")
    return to_dict(manifest) == data and bool(write_manifest(manifest))


def test_mutations_are_mutations() -> None:
    rng, data = random.Random(0), (GOLDEN / MANIFEST).read_bytes()
    assert resealed(data) == data
    changed = [mutate_bytes(data, rng) != data for _ in range(100)]
    assert sum(changed) > 90
