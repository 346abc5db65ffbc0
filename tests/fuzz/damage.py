"""Sealed damage, an attacker's: hashes, sizes and the checksum fit, so the deeper checks see it."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

from kvsmith.bundle.manifest import MANIFEST
from tests.fuzz.corpus import (
    Entries,
    Files,
    Odd,
    corpus,
    fingerprint,
    info,
    resealed,
    seal_data,
    sealed,
    shard_names,
    split,
)
from tests.fuzz.text import JUNK, mangled, mutate_value, reworded

NAMES = (
    *("../cache.safetensors", "../../../etc/passwd", "/etc/passwd", "/dev/zero", "a/b.safetensors"),
    *("./cache.safetensors", "cache.safetensors/", "cache.safetensors\n", "cache.safetensors\0"),
    *("CON.safetensors", "Cache.safetensors", ".safetensors", "-.safetensors", "_x.safetensors"),
    *("..safetensors", "a..safetensors", "a\\b.safetensors", "c:\\x.safetensors", "~.safetensors"),
    *("%2e%2e.safetensors", "caf\u00e9.safetensors", "\u202eab.safetensors", "\uff0e.safetensors"),
    *(
        "a" * 65 + ".safetensors",
        "a" * 5000 + ".safetensors",
        "",
        ".",
        "..",
        "model.pkl",
        "x.SAFETENSORS",
    ),
    *(
        "manifest.json",
        "Manifest.json",
        "readme.md",
        "README.md/",
        "README.md\0",
        "nul.safetensors",
    ),
)
FLOATS = (
    *(float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3.4028235e38),
    *(-3.4028235e38, 1.7e38, 1e20, 1e-38),
)


def manifest_bytes(files: Files, rng: random.Random) -> Entries:
    return {**files, MANIFEST: resealed(mangled(files[MANIFEST], rng))}


def manifest_text(files: Files, rng: random.Random) -> Entries:
    return {**files, MANIFEST: resealed(reworded(files[MANIFEST], rng))}


def manifest_values(files: Files, rng: random.Random) -> Entries:
    data, rest = split(files)
    mutate_value(data, rng)
    return {**rest, MANIFEST: seal_data(data)}


def model_shape(files: Files, rng: random.Random) -> Entries:
    """Another shape of the model, with a fingerprint that fits."""
    data, rest = split(files)
    base = data["base_model"]
    layer = rng.choice(base["layers"])
    sizes = (0, -1, 1, 2, 3, 7, 8, 16, 24, 64, 65536, 65537, 2**31, 2**62, 10**40, 1.0, None, True)
    kind = rng.randrange(6)
    if kind <= 1:
        layer[rng.choice(sorted(layer))] = rng.choice(sizes)
    elif kind == 2:
        many = rng.random() < 0.02
        base["layers"] = base["layers"] * rng.choice((1400, 4097) if many else (0, 2, 3, 50))
        base["owner"] = list(range(len(base["layers"])))
    elif kind == 3:
        base["owner"] = [
            rng.choice((0, i, i, -1, i + 1, 10**30)) for i in range(len(base["layers"]))
        ]
    elif kind == 4:
        base[rng.choice(("rope", "architecture"))] = rng.choice(JUNK)
    else:
        base["rope"][rng.choice(("rotary_dim", "alibi"))] = rng.choice(JUNK)
    base["config_hash"] = fingerprint(base)
    return sealed(data, rest)


def codec(files: Files, rng: random.Random) -> Entries:
    """Another cache: of another bundle, or one whose fields are drawn."""
    data, rest = split(files)
    if rng.random() < 0.2:
        data["cache"] = split(rng.choice(corpus()))[0]["cache"]
        return sealed(data, rest)
    part = data["cache"]["codec"][rng.choice("kv")]
    choices: dict[str, tuple[Any, ...]] = {
        "kind": ("identity", "uniform", "nuq", "fp8"),
        "bits": (0, 1, 2, 3, 4, 8, 9, 64, 10**9),
        "axis": ("channel", "token"),
        "group_size": (None, 0, 1, 2, 5, 8, 16, 2**40),
        "range": ("calibrated", "online"),
        "table": ("fitted", "nf"),
        "q_norm": (True, False),
    }
    for name in rng.sample(sorted(choices), rng.randrange(1, 4)):
        if name in part["quantizer"] or rng.random() < 0.1:
            part["quantizer"][name] = rng.choice(choices[name])
    fraction = rng.choice((0, 0.0, -0.0, 0.01, 0.05, 0.1, 0.49, 0.5, 1e-300, -1, 1e308))
    outliers = {"kind": rng.choice(("static_threshold", "top_k")), "fraction": fraction}
    if rng.random() < 0.5:
        part["outliers"] = rng.choice((None, outliers))
    windows = ("sinks", "recent", "block_size")
    if rng.random() < 0.3:
        tokens = rng.choice((-1, 0, 1, 3, 8, 16, 32, 2**20, 2**20 + 1, 2**63))
        data["cache"]["codec"][rng.choice(windows)] = tokens
    if rng.random() < 0.2:
        data["cache"]["page_size"] = rng.choice((-8, 0, 1, 8, 32, 2**20, 2**20 + 8, 2**70))
    return sealed(data, rest)


def file_names(files: Files, rng: random.Random) -> Entries:
    """A file is listed, and where the disk allows it is there, under a name that is a trick."""
    data, rest = split(files)
    name = rng.choice(NAMES)
    old = rng.choice(sorted(rest)) if rest and rng.random() < 0.7 else None
    content = rest[old] if old else b""
    entry = info(content)
    if rng.random() < 0.2:
        entry["size"] = rng.choice((-1, 0, 2**29, 2**30, 2**63, 10**30))
    data["files"][name] = entry
    if old and rng.random() < 0.7:
        del data["files"][old]
    here = name and not {"/", "\0"} & set(name) and name not in (".", "..") and len(name) < 200
    placed: Entries = {name: content} if here and name != MANIFEST else {}
    return {**rest, **placed, MANIFEST: seal_data(data)}


def kinds_of_files(files: Files, rng: random.Random) -> Entries:
    """Listed files that are links to the right content, pipes or folders; all hashes fit."""
    _, rest = split(files)
    if not rest:
        return {**files, MANIFEST: Odd("link", "original"), "original": files[MANIFEST]}
    name = rng.choice(sorted(rest))
    if rng.random() < 0.5:
        return {**files, name: Odd("link", "original"), "original": files[name]}
    data, _ = split(files)
    data["files"][name] = info(b"")
    odd = rng.choice((Odd("fifo"), Odd("folder"), Odd("socket"), Odd("link", "/dev/null")))
    return {**files, MANIFEST: seal_data(data), name: odd}


def shards(files: Files, rng: random.Random) -> Entries:
    """Tensors twice, elsewhere, or not at all; shards without tensors; shards of other bundles."""
    data, rest = split(files)
    names = shard_names(rest)
    other = rng.choice(corpus())
    foreign = [other[n] for n in shard_names(other)] or [b""]
    empty = struct.pack("<Q", 2) + b"{}"
    odd = rng.choice(
        (empty, empty, rng.choice(foreign), rng.choice([rest[n] for n in names] or [b""]))
    )
    if names and rng.random() < 0.3:
        del rest[rng.choice(names)]
    rest[rng.choice(("z.safetensors", "0.safetensors", *names))] = odd
    if rng.random() < 0.1:
        rest |= {f"e{i}.safetensors": empty for i in range(100)}
    return sealed(data, rest)


def shard_bytes(files: Files, rng: random.Random) -> Entries:
    return _with_shard(files, rng, lambda raw: mangled(raw, rng))


def header_text(files: Files, rng: random.Random) -> Entries:
    return _with_shard(files, rng, lambda raw: _headed(reworded(_header(raw), rng), raw))


def header_values(files: Files, rng: random.Random) -> Entries:
    def change(raw: bytes) -> bytes:
        header = json.loads(_header(raw))
        mutate_value(header, rng)
        return _headed(json.dumps(header).encode(), raw)

    return _with_shard(files, rng, change)


def header_layout(files: Files, rng: random.Random) -> Entries:
    """Shapes, offsets and lengths that are huge, negative, overlapping, descending, or swapped."""

    def change(raw: bytes) -> bytes:
        header = json.loads(_header(raw))
        a, b = (header[rng.choice(sorted(header))] for _ in range(2))
        begin, end = a["data_offsets"]
        offsets = (
            *(
                [end, begin],
                [begin, end + 4],
                [begin + 4, end + 4],
                [0, end - begin],
                [-4, end - begin - 4],
            ),
            *(
                [2**63, 2**63 + end - begin],
                [10**40, 10**40 + end - begin],
                b["data_offsets"],
                [begin],
            ),
            *([0, 2**62], [begin, begin], [float(begin), end], [False, end], [begin, end, end]),
        )
        shapes = (
            *([2**62], [2**32, 2**32], [0], [], [-1] * 2, [1] * 1000, [2**63] * 3, b["shape"]),
            *([1, *a["shape"]], a["shape"][::-1], [float(n) for n in a["shape"]]),
        )
        kind = rng.randrange(6)
        if kind <= 1:
            a["data_offsets"] = rng.choice(offsets)
        elif kind == 2:
            a["shape"] = rng.choice(shapes)
        elif kind == 3:  # sound: data in another order
            a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]
        elif kind == 4:
            a["dtype"] = rng.choice(("F16", "BF16", "F64", "f32", "I32", "U8", "F8_E4M3", "", None))
        else:
            header["__metadata__"] = rng.choice(
                ({}, {"a": "b"}, {"a": 1}, [], None, {"a": "x" * 9999})
            )
        return _headed(json.dumps(header).encode() + b" " * rng.choice((0, 0, 1, 7)), raw)

    return _with_shard(files, rng, change)


def header_length(files: Files, rng: random.Random) -> Entries:
    def change(raw: bytes) -> bytes:
        size = int.from_bytes(raw[:8], "little")
        lies = (0, 1, 2, size - 1, size + 1, size + 4, len(raw), len(raw) - 8, 2**21, 2**21 + 1)
        lie = rng.choice((*lies, 2**31, 2**32 + size, 2**40, 2**63, 2**64 - 1, 2**64 - 8))
        filler = rng.choice((b"", b"", b" " * 64, b"\0" * 64, b" " * 2**21))
        return struct.pack("<Q", lie % 2**64) + raw[8 : 8 + size] + filler + raw[8 + size :]

    return _with_shard(files, rng, change)


def numbers(files: Files, rng: random.Random) -> Entries:
    """Values that no encoder can work with, or only just."""

    def change(raw: bytes) -> bytes:
        start = 8 + int.from_bytes(raw[:8], "little")
        data = bytearray(raw)
        count = (len(raw) - start) // 4
        for _ in range(rng.choice((1, 1, 2, 30))):
            i, j = (start + 4 * rng.randrange(count) for _ in range(2))
            kind = rng.randrange(9)
            if kind == 8:  # the same for a stretch
                stretch = min(40, (len(raw) - i) // 4)
                data[i : i + 4 * stretch] = struct.pack("<f", rng.choice((3e38, 1.0))) * stretch
            elif kind <= 1:
                data[i : i + 4] = struct.pack("<f", rng.choice(FLOATS))
            elif kind <= 3:
                data[i : i + 4], data[j : j + 4] = data[j : j + 4], data[i : i + 4]
            elif kind <= 5:
                data[i + 3] ^= 0x80  # the sign
            else:
                data[i : i + 4] = rng.randbytes(4)
        return bytes(data)

    return _with_shard(files, rng, change)


def _with_shard(files: Files, rng: random.Random, change: Any) -> Entries:
    """Change one shard, and make size, hash and checksum fit; shard-less bundles get one."""
    data, rest = split(files)
    if not shard_names(rest):
        data, rest = split(corpus()[0])
    name = rng.choice(shard_names(rest))
    return sealed(data, {**rest, name: change(rest[name])})


def _header(raw: bytes) -> bytes:
    return raw[8 : 8 + int.from_bytes(raw[:8], "little")]


def _headed(header: bytes, raw: bytes) -> bytes:
    """The shard with another header."""
    return struct.pack("<Q", len(header)) + header + raw[8 + len(_header(raw)) :]
