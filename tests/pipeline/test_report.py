"""Table, comparisons and figures on made-up measurements."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from kvsmith.geometry import LayerGeometry, ModelGeometry
from kvsmith.pipeline.evaluation.candidate import FULL, Candidate
from kvsmith.pipeline.evaluation.drift import Drift
from kvsmith.pipeline.evaluation.fidelity import Fidelity
from kvsmith.pipeline.evaluation.footprint import Footprint
from kvsmith.pipeline.evaluation.greedy import Agreement
from kvsmith.pipeline.evaluation.measure import Measurement
from kvsmith.pipeline.evaluation.questions import Answers
from kvsmith.pipeline.evaluation.recall import Recall
from kvsmith.pipeline.report import table
from kvsmith.pipeline.report.chart import drifts, memory
from kvsmith.pipeline.report.codebooks import Codebook, plot_codebooks
from kvsmith.pipeline.report.plots import family, plot_chart, plot_losses
from kvsmith.pipeline.report.table import Row

SHAPE = ModelGeometry((LayerGeometry(2, 4, 64, 64),) * 2)
PNG = b"\x89PNG\r\n"


def row(
    name: str, role: Literal["baseline", "bundle"], bits: float, delta: float, noise: float = 0.0
) -> Row:
    """A candidate whose four windows lose `delta`, two of them `noise` more and two less."""
    losses = tuple(2 + delta + s * noise for s in (1, -1, 1, -1))
    fidelity = Fidelity(4, 400, 7.5, delta, 0.001, delta / 2, 1e-4, 5 * delta, 0.9, losses)
    size = Footprint(1024, int(1000 * bits), bits, 50.0, 3, 16)
    found = Measurement(
        size,
        fidelity,
        Agreement(4, 256, 0.5, 0.1, 99, 7.0, 1),
        Drift(4, 256, delta / 4, 0.001, 0.9, (128, 256), (delta / 5, delta / 3)),
        recall := Recall(20, 16, 1, 1.5, 0.2, 0.9, 0.5, (256,), (0.2, 0.8), ((1, 2),), ((0, 1),)),
        recall,
        Answers(4, 0.5, 0.25, (True, False, True, False)),
        bits - 1,
    )
    return Row(Candidate(name, role, f"conf/{name}"), found)


@pytest.fixture
def rows() -> list[Row]:
    full = row("full precision", "baseline", 32, 0.0)
    made = [
        replace(full, candidate=FULL),
        row("nuq3", "bundle", 4.0, 0.01),
        row("int4", "baseline", 5.0, 0.004),
        row("int3", "baseline", 4.0, 0.03),
        row("kivi2", "baseline", 3.5, 0.008, noise=0.004),
        row("int2", "baseline", 3.0, 0.5),
    ]
    return table.ordered([r.candidate for r in made], [r.found for r in made])


def test_rows_go_by_bits(rows: list[Row]) -> None:
    names = ["full precision", "int4", "int3", "nuq3", "kivi2", "int2"]
    assert [r.name for r in rows] == names


def test_cells_stand_under_their_columns(rows: list[Row]) -> None:
    cells = dict(zip(table.COLUMNS, table.cells(rows[1]), strict=True))
    assert cells == {
        "method": "int4",
        "bits/elem": "5.00",
        "at 32K": "4.00",
        "KV bytes": "5,000",
        "ppl": "7.500",
        "ppl %": "+0.40",
        "+-": "0.10",
        "KLD": "2.00e-03",
        "KLD 99.9%": "2.00e-02",
        "top-1 %": "90.00",
        "tok/s": "50",
    }
    control = dict(zip(table.COLUMNS, table.cells(rows[0]), strict=True))
    assert control["ppl"] == "7.500" and control["ppl %"] == control["KLD"] == ""
    assert table.task_cells(rows[1]) == [
        *("int4", "50", "10", "99", "7", "1.00e-03", "1.00e-03", "1.50", "0.20", "50"),
        *("1.50", "0.20", "50", "50.0", "25.0"),
    ]
    assert len(table.TASKS) == len(table.task_cells(rows[0]))
    assert table.answered(rows)[0].startswith("int4: +0.0 +- 0.0 points against full precision on")


def test_comparison_names_every_relation(rows: list[Row]) -> None:
    (line,) = table.comparisons(rows)
    assert line == (
        "nuq3 at 4.00 bits, +1.00 % perplexity: better than 1 of 2 baselines with as many bits or "
        "more (int3 4.00b +3.00 %); not better than int4 5.00b +0.40 %; "
        "better with fewer bits: kivi2 3.50b +0.80 % [within 2 se]."
    )
    # int2 has fewer bits and is worse: not a word. Without kivi2 nothing smaller is better.
    (line,) = table.comparisons([r for r in rows if r.name != "kivi2"])
    assert line.endswith("; none with fewer bits is better.")
    (line,) = table.comparisons([r for r in rows if r.candidate.role != "baseline"])
    assert line.endswith(": no baselines.")


def test_comparison_says_where_divergence_disagrees(rows: list[Row]) -> None:
    int3 = next(r for r in rows if r.name == "int3")
    closer = replace(int3.found.fidelity, kld=0.001)
    rows[rows.index(int3)] = replace(int3, found=replace(int3.found, fidelity=closer))
    (line,) = table.comparisons(rows)
    assert "(int3 4.00b +3.00 % [KLD the other way])" in line
    assert "int4 5.00b +0.40 %; better" in line


def test_markdown_and_json_hold_every_row(rows: list[Row]) -> None:
    page = table.markdown("tiny", ["16 windows"], rows)
    lines = page.splitlines()
    grid = [line for line in lines if line.startswith("|")]
    assert len(grid) == 2 * (2 + len(rows))
    widths = {len(table.COLUMNS) + 1, len(table.TASKS) + 1}
    assert {line.count("|") for line in grid} == widths
    assert lines[0] == "# tiny" and "- 16 windows" in lines
    assert any("nuq3 at" in line for line in lines)
    data = json.loads(json.dumps(table.plain(rows[2])))
    assert (data["name"], data["source"], data["fidelity"]["delta"]) == ("int3", "conf/int3", 0.03)


def test_families() -> None:
    names = ["kvquant_nuq3_o1", "kvquant_nuq4_o1", "int4_token_g32", "int2_token", "kivi2"]
    found = [family(name) for name in names]
    assert found == [
        *("kvquant_nuq*_o1", "kvquant_nuq*_o1"),
        *("int*_token_g32", "int*_token", "kivi*"),
    ]


def test_figures_are_written(tmp_path: Path, rows: list[Row]) -> None:
    # One value that a logarithmic axis cannot show, and one without a standard error.
    none = row("int8", "baseline", 9.0, -0.001)
    lone = replace(none.found.fidelity, delta_se=None, kld_se=None)
    rows.append(replace(none, found=replace(none.found, fidelity=lone)))
    plot_losses(rows, tmp_path / "losses.png", "tiny")
    density = torch.rand(128)
    book = Codebook("layer 0, keys", density, density.flip(0), torch.linspace(-0.9, 0.9, 8))
    plot_codebooks([book] * 3, tmp_path / "codebooks.png", "nuq3")
    plot_losses([none], tmp_path / "one.png", "tiny")
    plot_chart(drifts(rows), tmp_path / "drift.png")
    plot_chart(memory(rows, SHAPE, 10**9), tmp_path / "memory.png")
    for name in ("losses.png", "codebooks.png", "one.png", "drift.png", "memory.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("codebooks.png", "drift.png", "losses.png", "memory.png", "one.png"),
    ]
