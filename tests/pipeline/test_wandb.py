"""logger=wandb in earnest, offline: what its file of a run holds."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvsmith.pipeline import calibrate, evaluate, export
from kvsmith.pipeline.config import load
from tests.micro_model import write_model, write_text

pytestmark = pytest.mark.slow
BLOCK, HEAD = 32768, 7


def records(folder: Path) -> Iterator[Any]:
    """The records of a run's file: chunks of a log in LevelDB's format, behind seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, parts = path.read_bytes(), HEAD, b""
    while at + HEAD <= len(data):
        if BLOCK - at % BLOCK < HEAD:
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + HEAD])
        parts += data[at + HEAD : at + HEAD + size]
        at += HEAD + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def logged(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """(last value of every name, parts of tables and images as `name/part`; artifacts) of a run."""
    values: dict[str, Any] = {}
    artifacts = []
    for record in records(folder):
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            values[name] = json.loads(item.value_json)
        request = record.request.log_artifact.artifact
        found = record.artifact if record.HasField("artifact") else request
        artifacts += [found] if found.name else []
    return values, artifacts


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, micro_llama: Callable[..., Any]) -> Path:
    """Folders of a calibration, an export and an evaluation."""
    root = tmp_path_factory.mktemp("wandb")
    given = [f"model.path={write_model(root / 'micro', micro_llama, head_dim=32)}"]
    given += ["logger=wandb", "logger.mode=offline", "data=textfile"]
    given += [f"data.path={write_text(root / 'text.txt')}", "data.piece_chars=300"]
    more = ["samples=8", "length=64", "codecs=[nuq4_o1]", f"folder={root}/calibration"]
    calibrate.run(load(calibrate.CalibrateConfig, "calibrate", [*given, *more]), root / "a")
    more = ["codec=nuq4_o1", f"calibrations={root}/calibration", f"bundles={root}/bundles"]
    export.run(load(export.ExportConfig, "export", [*given, *more]), root / "b")
    more = [f"bundles={root}/bundles", f"calibrations={root}/calibration", "debug=smoke"]
    more += [f"results={root}/results"]
    evaluate.run(load(evaluate.EvaluateConfig, "evaluate", [*given, *more]), root / "c")
    return root


def test_a_calibration_logs_its_errors_as_scalars_and_table(runs: Path) -> None:
    values, _ = logged(runs / "a")
    assert values["step"] == 0 and 0 < values["nuq4_o1/k_rmse"] < 0.2
    assert values["errors/_type"] == "table-file" and values["errors/ncols"] == 3
    assert (runs / "a" / "errors.csv").read_text().startswith("layer,nuq4_o1 k,nuq4_o1 v\n0,")


def test_an_export_logs_the_bundle_as_an_artifact(runs: Path) -> None:
    values, artifacts = logged(runs / "b")
    (bundle,) = (runs / "bundles" / "micro").iterdir()
    (sent,) = (a for a in artifacts if a.type == "bundle")
    assert sent.name == bundle.name and json.loads(sent.metadata)["codec"] == "nuq4_o1"
    held = {entry.path: entry.size for entry in sent.manifest.contents}
    assert held == {path.name: path.stat().st_size for path in bundle.iterdir()}
    assert values["bits/nrows"] == 1 and values["bytes"] > 1000


def test_an_evaluation_logs_scalars_table_and_figures(runs: Path) -> None:
    values, _ = logged(runs / "c")
    results = json.loads((runs / "c" / "results.json").read_text())
    row = next(row for row in results["rows"] if row["name"] == "nuq4_o1")
    assert values["nuq4_o1/perplexity"] == row["fidelity"]["perplexity"]
    assert values["results/nrows"] == len(results["rows"]) == 3
    for figure in ("losses", "codebooks-nuq4_o1"):
        assert values[f"{figure}/_type"] == "image-file"
        (kept,) = (runs / "c").glob(f"wandb/offline-run-*/files/{values[f'{figure}/path']}")
        assert kept.read_bytes() == (runs / "c" / f"{figure}.png").read_bytes()
    lines = (runs / "c" / "results.csv").read_text().splitlines()
    assert len(lines) == 4 and lines[0].startswith("method,role,source,bits_per_element,")
    assert (runs / "c" / "metrics.jsonl").is_file() and (runs / "c" / "metrics.csv").is_file()
