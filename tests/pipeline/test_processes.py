"""Calibration by several processes: the bytes of one, whoever dies meanwhile."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvsmith.pipeline import calibrate, export, ranks
from kvsmith.pipeline.calibrate import CalibrateConfig
from kvsmith.pipeline.calibration import collect
from kvsmith.pipeline.calibration.shards import sizes
from kvsmith.pipeline.config import load
from kvsmith.pipeline.ranks import check_processes
from kvsmith.pipeline.workers import Workers, start_workers
from tests.faults.kills import PHASES, contents
from tests.faults.tripwire import Tripwire
from tests.micro_model import write_model, write_text
from tests.processes import errors, together

CODEC = "kvquant_nuq3_o1"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, micro_llama: Callable[..., Any]) -> Path:
    """A model, a text, and in `whole` what one undisturbed process makes of them."""
    place = tmp_path_factory.mktemp("processes")
    write_model(place / "micro", micro_llama, layers=3)
    write_text(place / "text.txt")
    calibrate.run(settings(place, place / "whole"), place / "log")
    bundle(place, place / "whole")
    return place


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "SHARE", 0)  # a checkpoint after each batch
    monkeypatch.setattr(ranks, "GRACE", 0.5)


def settings(place: Path, work: Path, *more: str) -> CalibrateConfig:
    given = [f"model.path={place}/micro", "data=textfile", f"data.path={place}/text.txt"]
    given += [f"codecs=[{CODEC}]", "samples=7", "length=32", "batch_size=1", "shards=4"]
    given += ["checkpoint_seconds=0", f"folder={work}/calibration", *more]
    return load(CalibrateConfig, "calibrate", given)


def bundle(place: Path, work: Path) -> dict[str, bytes]:
    """Export the codec; everything that is left."""
    given = [f"model.path={place}/micro", f"codec={CODEC}", f"calibrations={work}/calibration"]
    export.run(
        load(export.ExportConfig, "export", [*given, f"bundles={work}/bundles"]), work / "log"
    )
    return contents(work)


def alike(cfg: CalibrateConfig, work: Path, count: int) -> list[Callable[[], Any]]:
    return [lambda: calibrate.run(cfg, work / "log")] * count


@pytest.mark.parametrize("count", [2, 3])
def test_processes_find_the_bytes_that_one_finds(place: Path, tmp_path: Path, count: int) -> None:
    first, *others = together(tmp_path, *alike(settings(place, tmp_path), tmp_path, count))
    assert first[0] == 0 and f"collect, 1 of {count} processes" in first[1], first[1]
    assert all(other == (0, "") for other in others), "only the first speaks"
    assert bundle(place, tmp_path) == contents(place / "whole")
    first, *_ = together(tmp_path, *alike(settings(place, tmp_path), tmp_path, count))
    assert first[0] == 0 and "statistics of 224 tokens were collected before" in first[1]


def test_layers_run_twice_with_inputs_in_files(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "ACTIVATIONS", 0)
    monkeypatch.setattr("kvsmith.pipeline.memory.SMALL", 64)
    together(tmp_path, *alike(settings(place, tmp_path), tmp_path, 2))
    assert bundle(place, tmp_path) == contents(place / "whole")


def test_a_budget_is_spent_alike(place: Path, tmp_path: Path) -> None:
    asked = ["target_bits=5.5", "fit.windows=2", "fit.check=2", "fit.length=32", "fit.widths=[2,4]"]
    asked += ["fit.fractions=[0.0]", "fit.context=512"]
    made = []
    for count in (1, 2):
        work = tmp_path / str(count)
        cfg = settings(place, work, f"bundles={work}/bundles", *asked)
        first, *others = together(work, *alike(cfg, work, count))
        assert first[0] == 0 and "bundle: " in first[1], first[1]
        assert all(other == (0, "") for other in others)
        made.append(contents(work))
    assert any("sensitivity" in name for name in made[0]) and made[0] == made[1]


def test_without_gradients(place: Path, tmp_path: Path) -> None:
    made = []
    for count in (1, 2):
        work = tmp_path / str(count)
        cfg = settings(place, work, "fisher=false", "sensitivity=none")
        assert together(work, *alike(cfg, work, count))[0][0] == 0
        made.append(contents(work))
    assert made[0] and made[0] == made[1]


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_process_ends_the_run_and_any_number_continues(
    place: Path, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    count, dies = rng.choice((2, 3)), seed % 2
    cfg, wire = settings(place, tmp_path), Tripwire(rng.randrange(60), rng.choice(PHASES))
    jobs = alike(cfg, tmp_path, count)

    def doomed() -> None:
        wire.install()
        calibrate.run(cfg, tmp_path / "log")

    jobs[dies] = doomed
    found = together(tmp_path, *jobs)
    assert found[dies][0] == -signal.SIGKILL
    for code, said in (f for rank, f in enumerate(found) if rank != dies):
        assert code == 1 and len(errors(said)) == 1, said
        assert "one that ended" in said and "Start the same command again" in said, said
    again = together(tmp_path, *alike(cfg, tmp_path, rng.choice((1, 2, 3))))
    assert {code for code, _ in again} == {0}, again
    assert bundle(place, tmp_path) == contents(place / "whole")


def test_sigterm_leaves_checkpoints_and_one_line(place: Path, tmp_path: Path) -> None:
    cfg = settings(place, tmp_path)

    def slow() -> None:
        batch = collect.Collect._batch

        def waiting(self: collect.Collect, tokens: torch.Tensor) -> float | None:
            time.sleep(1.0)
            return batch(self, tokens)

        collect.Collect._batch = waiting  # type: ignore[method-assign]
        calibrate.run(cfg, tmp_path / "log")

    found = together(tmp_path, slow, slow, ask=2.5)
    assert [code for code, _ in found] == [143, 143], found
    assert found[0][1].endswith("the same command continues where it stopped\n")
    assert found[1][1] == "" and list(tmp_path.rglob("checkpoint.json"))
    first, *_ = together(tmp_path, *alike(cfg, tmp_path, 3))
    assert first[0] == 0 and bundle(place, tmp_path) == contents(place / "whole")


def test_one_process_meets_what_the_others_do_not(place: Path, tmp_path: Path) -> None:
    cfg = settings(place, tmp_path)

    def poisoned() -> None:
        collect.Taps.run = broken  # type: ignore[method-assign]
        calibrate.run(cfg, tmp_path / "log")

    def broken(*_: Any) -> float:
        raise ValueError("layer 1: activations of keys (k) must be finite, got NaN.")

    first, second = together(tmp_path, *alike(cfg, tmp_path, 1), poisoned)
    assert second == (1, "error: layer 1: activations of keys (k) must be finite, got NaN.\n")
    assert first[0] == 1 and "one that ended" in first[1]
    other = settings(place, tmp_path, "seed=1")
    first, second = together(tmp_path, *alike(cfg, tmp_path, 1), *alike(other, tmp_path, 1))
    assert first[0] == second[0] == 1
    assert "process 1: calibration must be" in second[1] and len(errors(second[1])) == 1


def test_what_makes_no_sense_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = settings(place, tmp_path)
    spread = replace(cfg, model=replace(cfg.model, device_map="auto"))
    first, _ = together(tmp_path, *alike(spread, tmp_path, 2))
    assert first[0] == 1 and "model.device_map: value must be null with 2 processes" in first[1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"evaluate\.py: processes must be 1, got 2\. Start it w"):
        check_processes("evaluate.py", allowed=False)
    monkeypatch.setattr(sys, "argv", ["calibrate.py", "-m", "seed=1,2"])
    with pytest.raises(ValueError, match="processes must be 1 with --multirun, got 2"):
        check_processes("calibrate.py", allowed=True)
    with pytest.raises(ValueError, match="environment variable RANK expected"):
        start_workers(cfg.model)


def test_a_dry_run_divides_the_time(place: Path, tmp_path: Path) -> None:
    cfg = settings(place, tmp_path, "dry_run=true")
    first, second = together(tmp_path, *alike(cfg, tmp_path, 2))
    assert first[0] == second[0] == 0 and "predicted: 0:" in first[1] and second[1] == ""


@pytest.mark.parametrize(
    ("samples", "batch", "shards", "expected"),
    [
        (7, 1, 4, (1, 2, 2, 2)),
        (64, 8, 8, (8,) * 8),
        (10, 4, 8, (4, 4, 2)),
        (10, 4, 2, (4, 6)),
        (3, 8, 5, (3,)),
    ],
)
def test_shards_are_whole_batches(
    place: Path, samples: int, batch: int, shards: int, expected: Sequence[int]
) -> None:
    record = next((place / "whole" / "calibration" / "micro").iterdir())
    source = calibrate.read_record(record).source
    found = sizes(replace(source, samples=samples, batch_size=batch, shards=shards))
    assert found == expected and sum(found) == samples


def test_shares_of_work() -> None:
    shares = [Workers(r, 3, torch.device("cpu")).share(range(7)) for r in range(3)]
    assert shares == [(0, 3, 6), (1, 4), (2, 5)]
