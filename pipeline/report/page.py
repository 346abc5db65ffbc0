"""One HTML page for a comparison: everything in the file, nothing fetched, light and dark."""

from __future__ import annotations

import base64
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from kvsmith.geometry import ModelGeometry
from kvsmith.pipeline.report import table
from kvsmith.pipeline.report.chart import Axis, Chart, Series, charts
from kvsmith.pipeline.report.svg import render
from kvsmith.pipeline.report.table import Row

STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ddd; --soft: #f4f6f8;
  --ours: #0072b2; --others: #d55e00; --full: #777; --c0: #0072b2; --c1: #d55e00; --c2: #009e73;
  --c3: #cc79a7; --c4: #b8860b; --c5: #56b4e9; --c6: #7a4fbf; --c7: #444; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181b; --line: #3a3f45;
  --soft: #1f2327; --ours: #56b4e9; --others: #e69f00; --full: #aaa; --c0: #56b4e9; --c1: #e69f00;
  --c2: #2dd4a7; --c3: #f0a6cc; --c4: #f0e442; --c5: #8ecbff; --c6: #b79cf0; --c7: #ccc; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.wide { overflow-x: auto; } .ours td:first-child { color: var(--ours); font-weight: 600; }
figure { margin: 1.5rem 0; } figcaption { font-weight: 600; }
svg { width: 100%; max-width: 860px; background: var(--soft); border-radius: 6px; }
svg text { fill: var(--ink); font-size: 11px; } img { max-width: 100%; background: #fff; }
.key { display: flex; flex-wrap: wrap; gap: 0 1.2rem; padding: 0; list-style: none;
  font-size: 12px; }
.key i { display: inline-block; width: 1.4em; height: 3px; margin-right: .4em;
  vertical-align: middle; }
.chosen { outline: 2px solid var(--ink); font-weight: 700; }
code { background: var(--soft); padding: 0 .3rem; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: of the window.
        parts: HTML, from `section` and its like.
    """
    # An icon in the page keeps browsers from asking for one.
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        '<link rel="icon" href="data:,">'
    )
    style = f"<title>{escape(title)}</title><style>{STYLE}</style>"
    body = "<body>" + "\n".join(parts) + "</body>"
    return f'<!doctype html>\n<html lang="en"><head>{head}{style}</head>\n{body}</html>\n'


def section(
    title: str,
    protocol: Sequence[str],
    rows: Sequence[Row],
    facts: Sequence[str] = (),
    images: Sequence[Path] = (),
    shape: ModelGeometry | None = None,
    weights: int = 0,
) -> str:
    """One comparison: charts, tables, what beats what, recall, codebooks, how it was measured.

    Args:
        title: what was measured.
        protocol: how, in sentences.
        rows: by all-in bits.
        facts: command, commit, hardware and versions of the runs.
        images: PNG files of the runs; they become part of the page.
        shape: the model's; None leaves out the charts that are computed from it.
        weights: bytes of its parameters.
    """
    ours = {row.name for row in rows if row.candidate.role == "bundle"}
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(table_of(*part, ours) for part in table.tables(rows)),
        _list([*table.comparisons(rows), *table.answered(rows)]),
        *(render(chart) for chart in charts(rows, shape, weights)),
        "<h2>Recall of planted strings, nats a token, by length of the text and depth</h2>",
        _needles(rows),
        *(_image(path) for path in images),
        "<h2>How it was measured</h2>",
        _list([*protocol, table.LEGEND, *facts]),
    ]
    return "\n".join(parts)


def budget_section(data: Mapping[str, Any], facts: Sequence[str] = ()) -> str:
    """What each side of each layer needs, what it got, and the front against uniform caches.

    Args:
        data: what calibrate.py leaves as budget.json.
        facts: command, commit, hardware and versions.
    """
    ours = data["curve"] or data["chosen"]
    chosen = (data["chosen"] or ours)[len(data["chosen"] or ours) // 2]
    title = f"{data['model']}: bits where they count"
    measured = all(p["kld_heldout"] for p in (chosen, *ours, *data["uniform"]))
    label = f"KLD, nats a token, {'held out' if measured else 'predicted'}"
    series = [
        Series(p["name"], ((p["bits"], y),), "others", line=False)
        for p in data["uniform"]
        if (y := _loss(p, measured)) > 0
    ]
    points = [(p["bits"], y) for p in ours if (y := _loss(p, measured)) > 0]
    series.append(Series("chosen by layer and side", tuple(points), "ours", line=len(points) > 1))
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<h2>Loss of one side alone, nats a token; outlined: chosen at {chosen['bits']:.2f} "
        "bits</h2>",
        _sensitivity(data, chosen["picks"]),
        render(Chart("Chosen against uniform", Axis("all-in bits", log=False), Axis(label),
                     tuple(series))),
        _list([f"Counted at {data['context']:,} tokens, calibration seed {data['seed']}.", *facts]),
    ]  # fmt: skip
    return "\n".join(parts)


def _loss(point: Mapping[str, Any], measured: bool) -> float:
    held = point["kld_heldout"]
    return float(sum(held) / len(held)) if measured else float(point["kld_predicted"])


def _sensitivity(data: Mapping[str, Any], picks: Sequence[Sequence[int]]) -> str:
    """Layers and sides by levels, darker where a choice hurts."""
    values = [x for layer in data["loss"] for side in layer for x in side if x > 0]
    low, high = (math.log10(f(values)) if values else 0.0 for f in (min, max))
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *data["levels"]))
    body = ""
    for layer, sides, pair in zip(data["layers"], data["loss"], picks, strict=True):
        for name, losses, pick in zip(data["sides"], sides, pair, strict=True):
            cells = ""
            for i, loss in enumerate(losses):
                share = (math.log10(loss) - low) / (high - low) if loss > 0 and high > low else 0.0
                mark = ' class="chosen"' if i == pick else ""
                cells += f'<td{mark} style="{_shade(share, "--others")}">{loss:.1e}</td>'
            body += f"<tr><td>layer {layer} {escape(name.upper())}</td>{cells}</tr>"
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def table_of(
    heading: str,
    columns: Sequence[str],
    lines: Sequence[Sequence[str]],
    ours: Collection[str] = (),
) -> str:
    """A table under a heading; lines whose first cell is among `ours` stand out."""
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = "".join(
        f'<tr class="{"ours" if cells[0] in ours else ""}">'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for cells in lines
    )
    grid = f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
    return f"<h2>{escape(heading)}</h2>{grid}"


def _needles(rows: Sequence[Row]) -> str:
    """Gains by length and depth, darker where more was kept of what the best candidate keeps."""
    best = max((g for r in rows for line in r.found.recall.grid for g in line), default=0.0)
    first = rows[0].found.recall
    wide = len(first.depths)
    head = "".join(f'<th colspan="{wide}">{n:,} tokens</th>' for n in first.lengths)
    shares = "".join(f"<th>{100 * d:.0f} %</th>" for d in first.depths) * len(first.lengths)
    body = f"<tr><th>depth</th>{shares}</tr>"
    for row in rows:
        cells = "".join(
            f'<td style="{_shade(g / best if best > 0 else 0.0, "--ours")}">{g:.2f}</td>'
            for line in row.found.recall.grid
            for g in line
        )
        body += f"<tr><td>{escape(row.name)}</td>{cells}</tr>"
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{body}</table></div>'


def _shade(share: float, colour: str) -> str:
    percent = max(0, min(60, round(60 * share)))
    return f"background: color-mix(in srgb, var({colour}) {percent}%, transparent)"


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    name = escape(path.name)
    return f'<p><img alt="{name}" src="data:image/png;base64,{data}"></p>'
