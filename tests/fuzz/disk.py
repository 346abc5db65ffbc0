"""Honest damage: what disks, copies and hands do to a folder; no checksum is made to fit."""

from __future__ import annotations

import random

from kvsmith.bundle.manifest import CARD, MANIFEST
from tests.fuzz.corpus import Entries, Files, Odd, corpus, shard_names
from tests.fuzz.text import mangled, reworded

_EXTRA = (
    *("x.safetensors", "model.pkl", "__init__.py", ".hidden", "manifest.json.bak", "sub", "README"),
    *("MANIFEST.JSON", "cache.safetensors.", "pytorch_model.bin", "CACHE.safetensors"),
)


def bytes_of_a_file(files: Files, rng: random.Random) -> Entries:
    name = rng.choice(sorted(files))
    return {**files, name: mangled(files[name], rng)}


def text_of_the_manifest(files: Files, rng: random.Random) -> Entries:
    return {**files, MANIFEST: reworded(files[MANIFEST], rng)}


def length_of_a_file(files: Files, rng: random.Random) -> Entries:
    name = rng.choice(sorted(files))
    data = files[name]
    longer = data + rng.choice((b"\0", b"\n", b" " * 4096, data, b"\xff" * 2**16, b" " * 2**20))
    return {**files, name: rng.choice((data[: rng.randrange(len(data))], longer, b""))}


def files_of_other_bundles(files: Files, rng: random.Random) -> Entries:
    """One file, or the manifest's neighbours, come from elsewhere in the corpus."""
    other = rng.choice(corpus())
    name, source = rng.choice(sorted(files)), rng.choice(sorted(other))
    if rng.random() < 0.5:
        return {**files, name: other[source]}
    if len(files) > 2 and rng.random() < 0.5:
        a, b = rng.sample(sorted(files), 2)
        return {**files, a: files[b], b: files[a]}
    return {**other, MANIFEST: files[MANIFEST]}


def kinds_of_files(files: Files, rng: random.Random) -> Entries:
    """A file turns into a link, a pipe, a socket, a folder, or nothing."""
    name = rng.choice(sorted(files))
    targets = ("/dev/zero", "/dev/stdin", "/etc/passwd", "..", ".", "nowhere", name, f"./{name}~")
    target = rng.choice((*targets, "original"))
    odd = rng.choice(
        (Odd("fifo"), Odd("socket"), Odd("folder"), Odd("absent"), Odd("link", target))
    )
    kept: Entries = {"original": files[name]} if odd == Odd("link", "original") else {}
    return {**files, **kept, name: odd}


def files_nobody_lists(files: Files, rng: random.Random) -> Entries:
    """A reader does not open them, so whatever they are the bundle loads."""
    name = rng.choice(_EXTRA)
    other = rng.choice(corpus())
    content = other[rng.choice(sorted(other))]
    odds = (Odd("fifo"), Odd("socket"), Odd("folder"), Odd("link", "/dev/zero"))
    return {**files, name: rng.choice((content, b"", *odds))}


def cards_and_shards(files: Files, rng: random.Random) -> Entries:
    """Listed files go, or change names."""
    names = [CARD, *shard_names(files)]
    name = rng.choice([n for n in names if n in files] or [MANIFEST])
    rest: Entries = {n: d for n, d in files.items() if n != name}
    renamed = rng.choice((name.upper(), f" {name}", f"{name} ", f"{name}.", f"a{name}"))
    return {**rest, name: Odd("absent"), renamed: files[name]}
