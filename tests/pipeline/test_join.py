"""A sweep of evaluate.py and report.py, which joins its runs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvsmith.pipeline import calibrate, evaluate
from kvsmith.pipeline.config import load
from kvsmith.pipeline.evaluate import EvaluateConfig
from kvsmith.pipeline.report import table
from kvsmith.pipeline.report.join import join, main, over_seeds, read_budgets
from tests.micro_model import write_model, write_text


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, micro_llama: Callable[..., Any]) -> Path:
    """Three runs on one model, and one on other windows, as `evaluate.py -m codec=...` does."""
    root = tmp_path_factory.mktemp("sweep")
    given = [f"model.path={write_model(root / 'micro', micro_llama, head_dim=32)}", "data=textfile"]
    given += [f"data.path={write_text(root / 'text.txt')}", "data.piece_chars=300"]
    more = ["samples=8", "length=64", "codecs=[]", f"folder={root}/calibration"]
    calibrate.run(load(calibrate.CalibrateConfig, "calibrate", [*given, *more]), root / "logs")
    given += [f"bundles={root}/bundles", f"calibrations={root}/calibration", "debug=smoke"]
    given += [f"results={root}/results"]
    for i, codec in enumerate(("nuq4_o1", "nuq3_o1", "kivi2")):
        cfg = load(EvaluateConfig, "evaluate", [*given, f"codec={codec}"])
        evaluate.run(cfg, root / "runs" / str(i))
    given += ["codec=nuq4_o1", "data.piece_chars=250"]
    evaluate.run(load(EvaluateConfig, "evaluate", given), root / "other")
    return root


def test_a_codec_is_fitted_to_the_calibration_where_there_is_no_bundle(sweep: Path) -> None:
    rows = json.loads((sweep / "runs/0/results.json").read_text())["rows"]
    row = next(row for row in rows if row["name"] == "nuq4_o1")
    assert row["role"] == "bundle" and row["source"].startswith(str(sweep / "calibration/micro/"))
    assert [r["name"] for r in rows] == ["full precision", "nuq4_o1", "int4_token"]


def test_one_command_joins_a_sweep(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sweep / "runs")]) == 0
    said = capsys.readouterr().out
    assert "micro on held-out textfile" in said and "written to " in said
    with (sweep / "runs/joined.csv").open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"full precision", "nuq4_o1", "nuq3_o1", "kivi2", "int4_token"}
    facts = json.loads((sweep / "runs/joined.json").read_text())["comparisons"]
    assert len(facts) == 1 and len(facts[0]["runs"]) == 3
    for row in facts[0]["rows"]:
        assert float(rows[row["name"]]["perplexity"]) == row["fidelity"]["perplexity"]
        assert int(rows[row["name"]]["kv_bytes"]) == row["footprint"]["nbytes"]
    assert (sweep / "runs/joined.md").read_text().count("\n| ") == 12
    short = (sweep / "runs/joined.png").read_bytes()
    assert short.startswith(b"\x89PNG")
    assert main([str(sweep / "runs"), "--long"]) == 0
    assert (sweep / "runs/joined.png").read_bytes() != short


def test_what_was_read_is_what_was_written(sweep: Path) -> None:
    plain = json.loads((sweep / "runs/1/results.json").read_text())["rows"]
    rows = [table.read(row, "x") for row in plain]
    assert json.loads(json.dumps([table.plain(row) for row in rows])) == plain


def test_other_text_is_another_table(sweep: Path, tmp_path: Path) -> None:
    found = join([sweep / "runs", sweep / "other"])
    assert [len(c.rows) for c in found] == [5, 3]
    assert main([str(sweep / "runs"), str(sweep / "other"), "--to", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "joined.csv",
        "joined.json",
        "joined.html",
        "joined.md",
        "joined-0.png",
        "joined-1.png",
    }


def test_equal_names_of_different_caches_are_told_apart(sweep: Path, tmp_path: Path) -> None:
    data = json.loads((sweep / "runs/0/results.json").read_text())
    data["rows"][1]["fidelity"]["kld"] += 1
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "results.json").write_text(json.dumps(data))
    (found,) = join([sweep / "runs/0", tmp_path])
    names = [row.name for row in found.rows]
    assert sorted(names) == ["full precision", "int4_token", "nuq4_o1", "nuq4_o1 (again)"]


def test_runs_of_several_seeds_and_budgets_meet_on_one_page(sweep: Path, tmp_path: Path) -> None:
    for seed, more in ((0, 0.0), (1, 0.02)):
        data = json.loads((sweep / "runs/0/results.json").read_text())
        data["seed"] = data["config"]["measure"]["seed"] = seed
        data["protocol"][0] += f" seed {seed}"
        data["rows"][1]["fidelity"]["kld"] = 0.01 + more
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "results.json").write_text(json.dumps(data))
    point = {"name": "2b", "bits": 2.0, "kld_predicted": 0.1, "kld_heldout": [], "picks": [[0, 0]]}
    budget = {"model": "m", "levels": ["2b"], "layers": [0], "sides": ["k", "v"], "seed": 0}
    budget |= {"loss": [[[0.1], [0.2]]], "context": 4096}
    budget |= {"chosen": [point], "curve": [], "uniform": [point]}
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "budget.json").write_text(json.dumps(budget))
    found = join([tmp_path])
    ((title, columns, lines),) = over_seeds(found)
    assert title.endswith("mean +- standard deviation over seeds 0, 1")
    cells = next(cells for cells in lines if cells[0] == "nuq4_o1")
    assert cells[columns.index("KLD")] == "2.00e-02" and cells[2] == "2"
    assert cells[columns.index("KLD") + 1] == "1.41e-02"
    assert main([str(tmp_path)]) == 0
    page = (tmp_path / "joined.html").read_text()
    assert "over seeds 0, 1" in page and "m: bits where they count" in page
    assert main([str(tmp_path / "b")]) == 0
    assert "m: bits where they count" in (tmp_path / "b" / "joined.html").read_text()
    (tmp_path / "b" / "budget.json").write_text("{}")
    with pytest.raises(ValueError, match="budget.json: file must be what calibrate.py writes"):
        read_budgets([tmp_path])


def test_mistakes_are_one_line(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_name = '{"title": "", "config": {}, "protocol": [], "rows": [{}]}'
    for content, message in (
        (None, "folder must be one with results.json or budget.json in it, got none"),
        ("{}", "file must be what evaluate.py writes"),
        ("{", "file must be JSON"),
        (no_name, "rows[0]: key must be 'name'"),
    ):
        if content is not None:
            (tmp_path / "results.json").write_text(content)
        assert main([str(tmp_path)]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: {tmp_path}") and message in said and said.count("\n") == 1
    cfg = load(EvaluateConfig, "evaluate", ["codec=nuq4_o1"])
    with pytest.raises(ValueError, match="bundle: value must be null with codec, got x"):
        replace(cfg, bundle="x")
    paths = [f"model.path={sweep}/micro", f"bundles={tmp_path}", f"calibrations={tmp_path}"]
    none = load(EvaluateConfig, "evaluate", [*paths, "codec=nuq4_o1"])
    with pytest.raises(FileNotFoundError, match=r"none\. Run `python calibrate\.py model=micro"):
        evaluate.run(none, tmp_path / "run")
