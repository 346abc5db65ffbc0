"""The bench of decoding with a state times what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvsmith.less.state import State
from kvsmith.pipeline.less import bench
from tests.micro_model import write_model


def test_rows(
    tmp_path: Path, micro_llama: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "micro", micro_llama, max_position_embeddings=256)
    plain = State.fold
    arguments = ["--less", "lambda_pct5", "--prompt", "60", "--tokens", "12", "--repeats", "1"]
    small = [f"model.path={model}", "eviction.budget=24", "codec.block_size=4", "less.rank=2"]
    assert bench.main([*arguments, "--override", *small, "less.trained_ranks=[2]"]) == 0
    assert State.fold is plain  # the clock is taken off again
    said = capsys.readouterr().out.splitlines()
    alone = next(line.split() for line in said if "lambda_pct5, eviction alone" in line)
    whole = next(line.split() for line in said if line.startswith("lambda_pct5 "))
    assert alone[-2:] == ["0.0", "0.0"]
    assert 0 < float(whole[-1]) < 60 and 0 < float(whole[-2]) < 60
    assert bench.main([*arguments, "--override", *small, "eviction.budget=5"]) == 1


def test_shares_are_those_of_each_run() -> None:
    found = [(2.0, {"partial": 0.5, "fold": 0.1}), (4.0, {"partial": 1.0, "fold": 0.2})]
    assert bench.row("x", found, 1.5, 10) == ("x", "300.00", "2.00", "25.0", "5.0")
    assert bench.clock(torch.device("cpu")) <= bench.clock(torch.device("cpu"))
