"""The page is whole, fetches nothing, and shows names as they are."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from kvsmith.pipeline.evaluation.candidate import FULL, Candidate
from kvsmith.pipeline.evaluation.fidelity import Fidelity
from kvsmith.pipeline.evaluation.footprint import Footprint
from kvsmith.pipeline.evaluation.greedy import Agreement
from kvsmith.pipeline.evaluation.measure import Measurement
from kvsmith.pipeline.evaluation.recall import Recall
from kvsmith.pipeline.report.page import page, section
from kvsmith.pipeline.report.table import Row

VOID = {"meta", "img", "line"}
FOUND = Measurement(
    Footprint(1024, 10**6, 4.5, 100.0, 3, 16),
    Fidelity(2, 100, 16.0, 0.01, 0.001, 0.02, 0.001, 0.5, 0.97, (2.7, 2.8)),
    Agreement(2, 20, 0.5, 10.0, 0),
    Recall(4, 8, 1.0, 2.0, (1.5, 2.5), 0.5, 0.25),
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
    made = page("t<1", [section("t<1", ["how & why"], rows, ["commit abc"], images)])
    checker = Checker()
    checker.feed(made)
    assert checker.open == []
    assert checker.sources == ["data:image/png;base64,iVBORw=="]
    assert not re.search(r"https?:|@import|url\(", made)
    assert "<script" not in made and odd in checker.text
    for word in ("how & why", "commit abc", "KL divergence", "4.50", "1.50", "2.50"):
        assert word in checker.text
    assert "prefers-color-scheme: dark" in made and made.count("<circle") == 2


def test_a_page_without_losses_has_no_figure() -> None:
    made = page("t", [section("t", [], [Row(FULL, FOUND)])])
    assert "<svg" not in made and "full precision" in made
