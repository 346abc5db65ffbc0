"""How figures look: colours that colour-blind readers can tell apart, thin frames, PNG."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from kvsmith.pipeline.stage import atomic_write

# Okabe and Ito's palette: blue and green for bundles, orange to grey for their baselines.
OURS = ("#0072B2", "#009E73", "#56B4E9")
OTHERS = ("#D55E00", "#E69F00", "#CC79A7", "#555555")
INK, GRID, FILL = "#222222", "#DDDDDD", "#BFD7EA"


def pyplot() -> Any:
    """matplotlib without a display; imported only where figures are drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def frame(ax: Any) -> None:
    """No box: two axes and small, dark tick labels."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(colors=INK, labelsize=9)


def save(fig: Any, path: Path, title: str) -> None:
    """Write `fig` under `title` as PNG, and forget it."""
    fig.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12)
    png = io.BytesIO()
    fig.savefig(png, format="png", dpi=150)
    atomic_write(path, png.getvalue())
    pyplot().close(fig)
