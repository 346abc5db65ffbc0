"""`python -m kvsmith inspect` and `verify`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvsmith.__main__ import main
from tests.conftest import ROOT

GOLDEN = ROOT / "artifacts" / "golden" / "bundle-v1"


def test_inspect_says_what_a_bundle_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(GOLDEN)]) == 0
    said = capsys.readouterr().out
    for word in ("made by", "model", "keys", "values", "bits", "file", "cache.safetensors"):
        assert word in said


def test_verify_names_what_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "b"
    shutil.copytree(GOLDEN, copy)
    assert main(["verify", str(GOLDEN), str(copy)]) == 0
    assert capsys.readouterr().out.count("whole, 2 files") == 2
    shard = copy / "cache.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    assert main(["verify", str(copy), str(GOLDEN)]) == 1
    said = capsys.readouterr()
    assert said.out.count("whole") == 1
    assert said.err.startswith(f"error: {shard}: sha256 must be") and said.err.count("\n") == 1


def test_verify_compares_with_a_model(
    tmp_path: Path, micro_llama: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    micro_llama(layers=3).config.save_pretrained(tmp_path)
    assert main(["verify", str(GOLDEN), "--model", str(tmp_path)]) == 1
    assert "base model's" in capsys.readouterr().err
    assert main(["verify", "nowhere/at all"]) == 1
