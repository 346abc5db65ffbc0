"""The page is whole, fetches nothing, and shows names as they are."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from kvsmith.geometry import LayerGeometry, ModelGeometry
from kvsmith.pipeline.evaluation.candidate import FULL, Candidate
from kvsmith.pipeline.evaluation.drift import Drift
from kvsmith.pipeline.evaluation.fidelity import Fidelity
from kvsmith.pipeline.evaluation.footprint import Footprint
from kvsmith.pipeline.evaluation.greedy import Agreement
from kvsmith.pipeline.evaluation.measure import Measurement
from kvsmith.pipeline.evaluation.recall import Recall
from kvsmith.pipeline.report.chart import ticks
from kvsmith.pipeline.report.page import budget_section, page, section
from kvsmith.pipeline.report.table import Row

VOID = {"meta", "img", "line", "link"}
SHAPE = ModelGeometry((LayerGeometry(2, 4, 64, 64),) * 2)
RECALL = Recall(
    4,
    8,
    1.0,
    2.0,
    0.1,
    0.5,
    0.25,
    (64, 128),
    (0.2, 0.8),
    ((1.5, 2.5), (0.5, 3.5)),
    ((0.0, 1.0),) * 2,
)
FOUND = Measurement(
    Footprint(1024, 10**6, 4.5, 100.0, 3, 16),
    Fidelity(2, 100, 16.0, 0.01, 0.001, 0.02, 0.001, 0.5, 0.97, (2.7, 2.8)),
    Agreement(2, 20, 0.5, None, 10.0, 2.0, 0),
    Drift(2, 20, 0.03, 0.001, 0.9, (10, 20), (0.02, 0.04)),
    RECALL,
    RECALL,
    None,
    4.3,
)


class Checker(HTMLParser):
    """Every tag is closed, and nothing refers outside of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [v or "" for n, v in attrs if n in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    odd = 'a<script>alert("x")</script>&amp;'
    near = replace(FOUND, fidelity=replace(FOUND.fidelity, kld=2e-4))
    rows = [
        Row(FULL, FOUND),
        Row(Candidate(odd, "bundle", "b"), FOUND),
        Row(Candidate("int4", "baseline", "c"), near),
    ]
    (tmp_path / "codebooks.png").write_bytes(b"\x89PNG")
    images = [tmp_path / "codebooks.png"]
    parts = section("t<1", ["how & why"], rows, ["commit abc"], images, SHAPE, 10**9)
    made = page("t<1", [parts])
    checker = Checker()
    checker.feed(made)
    assert checker.open == []
    assert checker.sources == ["data:,", "data:image/png;base64,iVBORw=="]
    assert not re.search(r"https?:|@import|url\(", made)
    assert "<script" not in made and odd in checker.text
    for word in (
        "how & why",
        "commit abc",
        "KL divergence",
        "4.50",
        "80 %",
        "1.50",
        "3.50",
        "one h200",
        "Errors over",
    ):
        assert word in checker.text
    assert "prefers-color-scheme: dark" in made and made.count("<circle") == 4
    assert made.count("<svg") == 5  # two losses, errors, memory, speed


def test_a_page_without_losses_has_no_figure() -> None:
    made = page("t", [section("t", [], [Row(FULL, FOUND)])])
    assert "<svg" not in made and "full precision" in made


def test_a_budget_is_drawn_with_what_was_chosen() -> None:
    point = {"bits": 3.0, "bytes": 10, "kld_predicted": 0.01, "kld_heldout": [0.01, 0.02]}
    data = {
        "model": "m<1",
        "context": 32768,
        "seed": 0,
        "levels": ["2b", "4b"],
        "layers": [0, 3],
        "sides": ["k", "v"],
        "loss": [[[0.1, 0.001], [0.2, 0.0]], [[0.3, 0.01], [0.4, 0.02]]],
        "chosen": [{"name": "fit", "picks": [[1, 0], [0, 1]], **point}],
        "curve": [],
        "uniform": [{"name": "2b", "picks": [], **point, "bits": 2.0}],
    }
    made = page("b", [budget_section(data, ["commit abc"])])
    checker = Checker()
    checker.feed(made)
    assert checker.open == [] and "m<1" in checker.text and "commit abc" in checker.text
    assert made.count('class="chosen"') == 4 and made.count("<tr>") == 5
    assert "layer 3 V" in checker.text and "held out" in checker.text
    # Of four choices the outlined ones are those of the picks.
    outlined = re.findall(r'class="chosen"[^>]*>([^<]+)<', made)
    assert outlined == ["1.0e-03", "2.0e-01", "3.0e-01", "2.0e-02"]
    picks = [[[i, i], [i, i]] for i in (0, 1)]
    curve = [{"name": "fit", "picks": p, **point, "bits": 2.0 + i} for i, p in enumerate(picks)]
    made = page("b", [budget_section({**data, "chosen": [], "curve": curve})])
    assert "<polyline" in made and "chosen at 3.00 bits" in made


def test_axes_have_round_ticks() -> None:
    assert ticks(0.8, 30, log=True) == [1, 2, 5, 10, 20]
    assert ticks(1e-6, 1e3, log=True) == [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100, 1000][::1]
    assert ticks(2.1, 7.9, log=False) == [3, 4, 5, 6, 7]
