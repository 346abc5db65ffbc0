"""Tens of thousands of damaged bundles: each is refused by a BundleError or loads what it holds.

`make fuzz` runs a million of them; see tests/fuzz.
"""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

import kvsmith
from kvsmith.bundle import Bundle, BundleError, bundle, tensors
from kvsmith.bundle.manifest import MANIFEST
from tests.fuzz.campaign import HONEST, SEALED, Failure, make_case, run
from tests.fuzz.corpus import Case, corpus, resealed, split
from tests.fuzz.oracle import Wrong, judge
from tests.fuzz.text import mangled, mutate_value, reworded
from tests.golden import GOLDEN

BLOCK = 5000
SECONDS = 2.0  # CPU time of the slowest load, of which most are below 0.01
MEMORY = 96 * 2**20  # growth of the peak, bytes
REACHED = (
    *(
        "file must be valid JSON",
        "nesting must be",
        "file must be a JSON object",
        "checksum of the",
    ),
    *("format must be", "format_version must be", "key must be one of", "of type int", "a mapping"),
    *("file name must be", "size must be", "sha256 must be", "must be present", "a regular file"),
    *("readable regular file", "header length", "header must be", "dtype must be", "shape must be"),
    *("data_offsets must be", "data offset must be", "data must be", "bytes apart", "__metadata__"),
    *("strictly increasing", "must be sorted", "between their neighbours", "must be positive"),
    *("must be finite", "decoded values", "that the codec owns", "config_hash", "owner must be"),
    *("group_size", "outliers", "multiple of block_size", "tokens", "size of all"),
)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(4))
def test_damage_is_refused_or_harmless(block: int, tmp_path: Path) -> None:
    tally = run(tmp_path, 0, range(block * BLOCK, (block + 1) * BLOCK))
    assert tally.tried.total() == BLOCK and len(tally.tried) == len(HONEST) + len(SEALED)
    assert tally.refused.total() >= 0.8 * BLOCK
    assert tally.refused["disk.files_nobody_lists"] == 0
    assert tally.slowest[0] < SECONDS, tally.slowest
    assert tally.memory < MEMORY, tally.memory
    reached = "\n".join(tally.reasons)
    assert not [reason for reason in REACHED if reason not in reached]


def test_a_case_depends_on_its_numbers_alone() -> None:
    first, second = (make_case(3, 14), make_case(3, 15))
    assert make_case(3, 14) == first != second


def test_mutations_are_mutations() -> None:
    rng, data = random.Random(0), (GOLDEN / MANIFEST).read_bytes()
    assert resealed(data) == data
    for change in (mangled, reworded):
        assert sum(change(data, rng) != data for _ in range(100)) > 80
    values = split(corpus()[0])[0]
    before = json.dumps(values)
    mutate_value(values, rng)
    assert json.dumps(values) != before


def skip(*_: object) -> None:
    return None


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (bundle, "check_parameters"),
        (tensors, "_check_values"),
        (tensors, "_check_names"),
        (kvsmith.bundle.manifest, "_check_seal"),
        (kvsmith.bundle.manifest, "_check_complete"),
        (kvsmith.bundle.manifest, "check_manifest"),
    ],
)
def test_a_check_that_is_left_out_is_noticed(
    module: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, skip)
    with pytest.raises(Failure, match="seed 0, number"):
        run(tmp_path, 0, range(2000))


def test_an_open_door_for_links_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bundle, "open_file", lambda folder, name, _links: (folder / name).open("rb")
    )
    monkeypatch.setattr("tests.fuzz.campaign.STALL", 2)  # opening a pipe waits for a writer
    with pytest.raises(Failure):
        run(tmp_path, 0, range(2000))


def test_the_judge_compares_content() -> None:
    sound = kvsmith.load(GOLDEN)
    honest, sealed = (Case("case", dict(corpus()[0]), honest) for honest in (True, False))
    for case in (honest, sealed):
        judge(sound, case, sound)
        for other in changed(sound):
            with pytest.raises(Wrong):
                judge(other, case, sound)


def changed(sound: Bundle) -> list[Bundle]:
    """The bundle with one thing of each kind changed."""
    name, tensor = next(iter(sound.parameters.items()))
    fewer = {n: t for n, t in sound.parameters.items() if n != name}
    quality = dataclasses.replace(sound.manifest, quality={"perplexity": 1.0})
    return [
        dataclasses.replace(sound, parameters={**sound.parameters, name: tensor * 1.0001}),
        dataclasses.replace(sound, parameters=fewer),
        dataclasses.replace(sound, card=sound.card + " "),
        dataclasses.replace(sound, manifest=quality),
    ]


def test_a_refusal_names_the_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise BundleError("two\nlines")

    tmp_path.joinpath("a").mkdir()
    good = kvsmith.load
    monkeypatch.setattr(kvsmith, "load", lambda home: good(home) if home.name == "0" else crash())
    with pytest.raises(BundleError):
        run(tmp_path / "a", 0, range(1))
