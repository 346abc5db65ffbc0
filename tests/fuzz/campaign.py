"""Loads damaged bundles by number, and counts what becomes of them.

Case n of a seed is the same on every machine, so a failure is repeated by its two numbers.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import kvsmith
from kvsmith.bundle import BundleError
from kvsmith.bundle.manifest import MANIFEST
from tests.fuzz import damage, disk
from tests.fuzz.corpus import Case, Entries, Files, Odd, corpus
from tests.fuzz.oracle import Wrong, judge

HONEST: tuple[Callable[[Files, random.Random], Entries], ...] = (
    disk.bytes_of_a_file,
    disk.text_of_the_manifest,
    disk.length_of_a_file,
    disk.files_of_other_bundles,
    disk.kinds_of_files,
    disk.files_nobody_lists,
    disk.cards_and_shards,
)
SEALED: tuple[Callable[[Files, random.Random], Entries], ...] = (
    damage.manifest_bytes,
    damage.manifest_text,
    damage.manifest_values,
    damage.model_shape,
    damage.codec,
    damage.file_names,
    damage.kinds_of_files,
    damage.shards,
    damage.shard_bytes,
    damage.header_text,
    damage.header_values,
    damage.header_layout,
    damage.header_length,
    damage.numbers,
)
STALL = 120  # seconds of wall time after which one case counts as hung


@dataclass
class Tally:
    """What became of the cases.

    Attributes:
        tried, refused: cases by name.
        reasons: parts of refusals, for the question which checks were reached.
        slowest: most CPU seconds that one load took, and the case.
        memory: growth of this process's peak, bytes.
        seconds: CPU time of everything.
    """

    tried: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    slowest: tuple[float, int] = (0.0, -1)
    memory: int = 0
    seconds: float = 0.0


class Failure(AssertionError):
    """Loading crashed, hung, or accepted what it must not."""


def make_case(seed: int, number: int) -> tuple[Case, int]:
    """Case and index of the sound bundle it comes from."""
    rng = random.Random(f"{seed}/{number}")
    index = rng.choice((0, 0, 0, 1, 1, 2))
    honest = rng.random() < len(HONEST) / (len(HONEST) + len(SEALED))
    mutate = rng.choice(HONEST if honest else SEALED)
    name = f"{mutate.__module__.rpartition('.')[2]}.{mutate.__name__}"
    return Case(name, mutate(corpus()[index], rng), honest), index


def run(folder: Path, seed: int, numbers: range, tally: Tally | None = None) -> Tally:
    """Load many damaged bundles.

    Args:
        folder: to work in; empty.
        seed, numbers: which cases.
        tally: to go on with.

    Returns:
        The tally; it is that of `tally`, where given.

    Raises:
        Failure: names seed and number.
    """
    tally = tally or Tally()
    homes = [_home(folder / str(i), files) for i, files in enumerate(corpus())]
    sound = [kvsmith.load(home) for home in homes]
    began, peak = time.process_time(), _peak()
    for number in numbers:
        case, index = make_case(seed, number)
        tally.tried[case.name] += 1
        with _placed(homes[index], corpus()[index], case.entries):
            try:
                spent = _attempt(homes[index], case, sound[index], tally)
            except Exception as error:
                where = f"seed {seed}, number {number} ({case.name})"
                raise Failure(f"{where}: {type(error).__name__}: {error}"[:2000]) from error
        tally.slowest = max(tally.slowest, (spent, number))
    tally.seconds += time.process_time() - began
    tally.memory = max(tally.memory, _peak() - peak)
    return tally


def _attempt(home: Path, case: Case, sound: kvsmith.bundle.Bundle, tally: Tally) -> float:
    """Load, and judge; gives the CPU seconds of loading."""
    began = time.process_time()
    with _alarm():
        try:
            bundle = kvsmith.load(home)
        except BundleError as error:
            spent = time.process_time() - began
            message = str(error)
            if not message.isprintable() or len(message) > 1200:
                raise Wrong(f"refusal of {len(message)} characters: {message!r}") from None
            tally.refused[case.name] += 1
            tally.reasons[reason(message, home)] += 1
            return spent
    spent = time.process_time() - began
    judge(bundle, case, sound)
    return spent


def reason(message: str, home: Path) -> str:
    """A refusal without the file and what was found."""
    return message.replace(str(home), "").rpartition(", got ")[0][:300] or message[:300]


def _home(folder: Path, files: Files) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@contextmanager
def _placed(home: Path, files: Files, entries: Entries) -> Iterator[None]:
    """The folder as the case has it; afterwards it is whole again."""
    touched = [n for n in files.keys() | entries.keys() if entries.get(n) != files.get(n)]
    try:
        for name in touched:
            _clear(home / name)
            if (entry := entries.get(name)) is not None:
                _place(home / name, entry)
        yield
    finally:
        for name in touched:
            _clear(home / name)
        for name in touched:
            if name in files:
                (home / name).write_bytes(files[name])


def _place(path: Path, entry: bytes | Odd) -> None:
    if isinstance(entry, bytes):
        path.write_bytes(entry)
    elif entry.kind == "link":
        path.symlink_to(entry.target)
    elif entry.kind == "fifo":
        os.mkfifo(path)
    elif entry.kind == "folder":
        (path / MANIFEST).mkdir(parents=True)
    elif entry.kind == "socket":
        _bind(path)


def _bind(path: Path) -> None:
    """A socket; their paths are limited to about a hundred bytes, so it is made from inside."""
    before = os.open(".", os.O_RDONLY)
    try:
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.fchdir(before)
        os.close(before)


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _alarm() -> Iterator[None]:
    def hung(*_: object) -> None:
        raise Failure(f"no answer in {STALL} seconds")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(STALL)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
