"""One HTML page for a comparison: everything in the file, nothing fetched, light and dark."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from kvsmith.pipeline.report import table
from kvsmith.pipeline.report.table import Row

WIDTH, HEIGHT, LEFT, BOTTOM = 760, 400, 70, 46
STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ddd; --soft: #f4f6f8;
  --ours: #0072b2; --others: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181b; --line: #3a3f45;
  --soft: #1f2327; --ours: #56b4e9; --others: #e69f00; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.wide { overflow-x: auto; } .ours td:first-child { color: var(--ours); font-weight: 600; }
svg { width: 100%; max-width: 860px; background: var(--soft); border-radius: 6px; }
svg text { fill: var(--ink); font-size: 11px; } img { max-width: 100%; background: #fff; }
code { background: var(--soft); padding: 0 .3rem; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: of the window.
        parts: HTML, from `section` and its like.
    """
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    style = f"<title>{escape(title)}</title><style>{STYLE}</style>"
    body = "<body>" + "\n".join(parts) + "</body>"
    return f'<!doctype html>\n<html lang="en"><head>{head}{style}</head>\n{body}</html>\n'


def section(
    title: str,
    protocol: Sequence[str],
    rows: Sequence[Row],
    facts: Sequence[str] = (),
    images: Sequence[Path] = (),
) -> str:
    """One comparison: figure, table, what beats what, recall by depth, how it was measured.

    Args:
        title: what was measured.
        protocol: how, in sentences.
        rows: by all-in bits.
        facts: commit, versions and folders of the runs.
        images: PNG files of the runs; they become part of the page.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        _scatter([r for r in rows if r.candidate.role != "full"]),
        _table(rows),
        _list([*table.comparisons(rows)]),
        "<h2>Recall of planted strings, nats a token, by depth</h2>",
        _recall(rows),
        *(_image(path) for path in images),
        "<h2>How it was measured</h2>",
        _list([*protocol, table.LEGEND, *facts]),
    ]
    return "\n".join(parts)


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in table.COLUMNS)
    body = "".join(
        f'<tr class="{"ours" if row.candidate.role == "bundle" else ""}">'
        + "".join(f"<td>{escape(cell)}</td>" for cell in table.cells(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _recall(rows: Sequence[Row]) -> str:
    """Gains by depth, darker where more was kept of what the best candidate keeps."""
    best = max((g for r in rows for g in r.found.recall.gain_by_depth), default=0.0)
    body = ""
    for row in rows:
        cells = "".join(
            f'<td style="background: color-mix(in srgb, var(--ours) {_share(g, best)}%, '
            f'transparent)">{g:.2f}</td>'
            for g in row.found.recall.gain_by_depth
        )
        body += f"<tr><td>{escape(row.name)}</td>{cells}</tr>"
    return f'<div class="wide"><table>{body}</table></div>'


def _share(gain: float, best: float) -> int:
    return max(0, min(60, round(60 * gain / best))) if best > 0 else 0


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    name = escape(path.name)
    return f'<p><img alt="{name}" src="data:image/png;base64,{data}"></p>'


def _scatter(rows: Sequence[Row]) -> str:
    """KL divergence (logarithmic) against all-in bits, as SVG."""
    points = [(r.bits, r.found.fidelity.kld, r) for r in rows if r.found.fidelity.kld > 0]
    if not points:
        return ""
    low, high = min(p[0] for p in points) - 0.3, max(p[0] for p in points) + 0.9
    bottom = math.floor(min(math.log10(p[1]) for p in points))
    top = max(math.ceil(max(math.log10(p[1]) for p in points)), bottom + 1)

    def x(bits: float) -> float:
        return LEFT + (WIDTH - LEFT - 10) * (bits - low) / (high - low)

    def y(kld: float) -> float:
        height = HEIGHT - BOTTOM
        return height - (height - 14) * (math.log10(kld) - bottom) / (top - bottom)

    marks = [
        *(_rule(LEFT, y(10**e), WIDTH - 10, y(10**e), f"1e{e}") for e in range(bottom, top + 1)),
        *(
            _rule(x(b), HEIGHT - BOTTOM, x(b), HEIGHT - BOTTOM + 4, str(b), below=True)
            for b in range(math.ceil(low), math.floor(high) + 1)
        ),
        f'<text x="{WIDTH / 2:.0f}" y="{HEIGHT - 8}">all-in bits per cached element</text>',
        '<text x="8" y="12">KL divergence, nats a token</text>',
        *(_point(x(bits), y(kld), row) for bits, kld, row in points),
    ]
    label = "KL divergence against all-in bits"
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg {size} role="img" aria-label="{label}">{"".join(marks)}</svg>'


def _rule(x1: float, y1: float, x2: float, y2: float, text: str, below: bool = False) -> str:
    """A line of the grid with its label."""
    place = (x1 - 4, y2 + 13) if below else (x1 - 40, y1 + 4)
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="var(--line)"/>'
        f'<text x="{place[0]:.1f}" y="{place[1]:.1f}">{text}</text>'
    )


def _point(x: float, y: float, row: Row) -> str:
    colour = "var(--ours)" if row.candidate.role == "bundle" else "var(--others)"
    name = escape(row.name)
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"><title>{name}</title></circle>'
        f'<text x="{x + 7:.1f}" y="{y + 4:.1f}">{name}</text>'
    )
