"""Less memory, same numbers: layers computed twice, statistics in files, half batches."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvsmith.pipeline import memory
from kvsmith.pipeline.calibrate import CalibrateConfig
from kvsmith.pipeline.calibration import collect, read_record, read_statistics
from kvsmith.pipeline.calibration.store import Store
from kvsmith.pipeline.taps import Taps, frozen
from tests.pipeline.test_calibrate import LAYERS, SAMPLES, cfg, files, go, model, tokens
from tests.runtime.models import FAMILIES as ALL
from tests.runtime.models import build

__all__ = ["cfg", "model", "tokens"]  # fixtures

FAMILIES = ("llama", "gemma2", "gemma3n", "gemma4", "gpt_oss", "gpt2", "falcon-alibi", "gptj")


def observed(model: Any, tokens: Tensor, **options: Any) -> dict[tuple[int, str], list[Tensor]]:
    seen: dict[tuple[int, str], list[Tensor]] = {}

    def consume(layer: int, name: str, values: Tensor, fisher: Tensor | None) -> None:
        assert fisher is not None
        seen.setdefault((layer, name), []).extend([values, fisher])

    with frozen(model):
        Taps(model, consume, 4, fisher=True, **options).run(tokens)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_layers_and_spilled_inputs_change_no_bit(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SMALL", 64)
    model = build(family, layers=4)
    tokens = torch.randint(3, 97, (2, 24))
    plain = observed(model, tokens)
    written: list[int] = []
    open_file = memory.tempfile.TemporaryFile
    monkeypatch.setattr(
        memory.tempfile, "TemporaryFile", lambda **k: (written.append(1), open_file(**k))[1]
    )
    frugal = observed(model, tokens, recompute=True, spill=tmp_path)
    assert plain.keys() == frugal.keys() and len(written) >= 4 and not os.listdir(tmp_path)
    for key, tensors in plain.items():
        for mine, theirs in zip(tensors, frugal[key], strict=True):
            assert torch.equal(mine, theirs), key
    assert not any("forward" in vars(m) for m in model.modules()), "the model is as it was"


def test_activations_of_every_family_are_estimated() -> None:
    sizes = {family: memory.activation_bytes(build(family, layers=4), 10) for family in ALL}
    assert set(sizes.values()) == {10 * 4 * 64 * memory.KEPT * 4}


def test_the_loss_in_pieces_is_the_loss(
    model: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = observed(model, tokens)
    monkeypatch.setattr("kvsmith.pipeline.taps.LOGITS", 97 * 5)
    pieces = observed(model, tokens)
    for key, tensors in whole.items():
        for mine, theirs in zip(tensors, pieces[key], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6 * float(mine.max()))


def test_spilled_statistics_are_the_same_bytes(
    cfg: CalibrateConfig,
    model: Any,
    tokens: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patient = replace(cfg, checkpoint_seconds=1e9)
    whole = files(go(replace(patient, folder=str(tmp_path / "whole")), model, tokens))
    loads: list[int] = []
    read = Store._read
    monkeypatch.setattr(Store, "_read", lambda self, entry: (loads.append(1), read(self, entry))[1])
    monkeypatch.setattr(collect.Collect.__init__, "__defaults__", (0,))
    assert files(go(patient, model, tokens)) == whole
    assert len(loads) >= LAYERS * (SAMPLES // cfg.batch_size - 1)


def test_sigterm_between_two_layers_loses_none(
    cfg: CalibrateConfig,
    model: Any,
    tokens: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patient = replace(cfg, checkpoint_seconds=1e9)
    whole = files(go(replace(patient, folder=str(tmp_path / "whole")), model, tokens))
    update, took = Store.update, []

    def interrupted(self: Store, layer: int, name: Any, number: int, *rest: Any) -> None:
        update(self, layer, name, number, *rest)
        took.append((layer, name, number))
        if (layer, number) == (1, 3):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Store, "update", interrupted)
    with pytest.raises(SystemExit) as leaving:
        go(patient, model, tokens)
    assert leaving.value.code == 143
    assert took[-1][0] == 1, "layer 0, which comes later, has not taken sequences 2 and 3"
    monkeypatch.setattr(Store, "update", update)
    assert files(go(patient, model, tokens)) == whole


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"
        ),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_the_batch_and_says_so(
    cfg: CalibrateConfig,
    model: Any,
    tokens: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
) -> None:
    """Counts and extremes differ by rounding of the model only, Fisher sums by a few of it."""
    big = replace(cfg, batch_size=4)
    plain = go(replace(big, folder=str(tmp_path / "whole")), model, tokens)
    update = Store.update

    def tight(self: Store, layer: int, name: Any, number: int, *rest: Any) -> None:
        if (layer, name, number) == (0, "v", 1) and not tight.said:  # type: ignore[attr-defined]
            tight.said = True  # type: ignore[attr-defined]
            raise error
        update(self, layer, name, number, *rest)

    tight.said = False  # type: ignore[attr-defined]
    monkeypatch.setattr(Store, "update", tight)
    capsys.readouterr()
    folder = go(big, model, tokens)
    assert "out of memory with batch_size=4; going on with 2" in capsys.readouterr().out
    assert folder.name == plain.name
    record = read_record(folder)
    for layer in range(LAYERS):
        want, got = (read_statistics(f, record, layer).state_dict() for f in (plain, folder))
        for name, tensor in want.items():
            if name.endswith(("seen", "exponent")):
                assert torch.equal(tensor, got[name]), name
            elif name.endswith("count"):
                moved = (tensor.double() - got[name].double()).abs().sum() / 2
                assert float(moved) <= 1e-3 * float(tensor.sum()), name
            else:
                scale = float(tensor.abs().max())
                moved = (tensor.double() - got[name].double()).abs().mean()
                assert float(moved) <= 1e-4 * scale, name


def test_one_sequence_too_much_is_one_line(
    cfg: CalibrateConfig, model: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tight(*_: Any) -> float:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(Taps, "run", tight)
    with pytest.raises(ValueError, match=r"length: sequence must be small enough .* got 24\. Use"):
        go(cfg, model, tokens)


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    cfg: CalibrateConfig, model: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> float:
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(Taps, "run", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        go(cfg, model, tokens)
