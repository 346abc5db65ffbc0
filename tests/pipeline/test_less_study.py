"""The study of states: cells are measured once, and the table is their mean."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvsmith.pipeline.less import study
from kvsmith.pipeline.less.study_table import Cell, Found, Result, lines
from tests.micro_model import write_model, write_text


def test_a_cell(
    tmp_path: Path, micro_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "micro", micro_llama, max_position_embeddings=256)
    text = write_text(tmp_path / "text.txt")
    overrides = (
        f"model.path={model}", "data=textfile", f"data.path={text}", "eviction.budget=26",
        "codec.block_size=4", "codec.recent=4", "less.samples=2", "less.batch_size=2",
        "less.steps=2", "less.stride=4", "less.held=2",
    )  # fmt: skip
    folder = tmp_path / "study"
    command = [
        "--policies", "lambda", "--budgets", "5", "--states", "state", "--folder", str(folder),
    ]  # fmt: skip
    command += ["--override", *overrides, "--seeds"]
    assert study.main([*command, "0", "1"]) == 0
    made = {
        line["cache"]: line for line in json.loads((folder / "table.json").read_text())["lines"]
    }
    assert set(made) == {"full precision", "eviction alone", "4 more tokens", "state"}
    assert made["full precision"]["kld"] == 0 and made["eviction alone"]["recovered"] == 0
    assert made["state"]["seeds"] == 2 and len(made["state"]["each"]) == 2
    assert made["state"]["seconds"] > 0 and made["state"]["each"][0] != made["state"]["each"][1]
    # State: 2 layers x 2 KV heads x 8 features of 16 float16 values and a float32 logit.
    assert made["state"]["bytes"] - made["eviction alone"]["bytes"] == 2 * 2 * 8 * (2 * 16 + 4)
    first = (folder / "table.csv").read_bytes()

    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(study, "decoded", never)
    assert study.main([*command, "0", "1"]) == 0  # nothing to do
    assert (folder / "table.csv").read_bytes() == first


def test_means_over_seeds() -> None:
    def found(*nll: float) -> Found:
        return Found(nll, 0.1, 10, None)

    cell = Cell("h2o", 5)
    result = Result(
        cell,
        {
            "full precision": {"": found(1.0, 2.0)},
            "eviction alone": {"": found(2.0, 4.0)},
            "state": {"0": found(1.5, 3.0), "1": found(1.7, 3.4)},
        },
    )
    state = list(lines([result]))[-1]
    assert state.each == pytest.approx((0.5, 0.3)) and state.recovered == pytest.approx(0.4)
    assert state.seeds_sd == pytest.approx(math.sqrt(0.02))
    # Gains of seed 0: 0.5 and 1.0 of a mean gap of 1.5; their mean's error is 0.25.
    assert state.windows_se == pytest.approx((0.25 / 1.5 + 0.15 / 1.5) / 2)
