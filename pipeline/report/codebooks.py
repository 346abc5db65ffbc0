"""Codebooks over the histograms of calibration values that they were fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from torch import Tensor

from kvsmith.pipeline.calibration import RECORD, read_record, read_statistics
from kvsmith.pipeline.evaluation.candidate import Candidate
from kvsmith.pipeline.fit import Sensitivity, histogram_for
from kvsmith.pipeline.fit.codec import tensor_codecs
from kvsmith.pipeline.report.style import FILL, INK, OTHERS, OURS, frame, pyplot, save

BINS = 128
PANELS = 3  # layers shown: the first, the last, and those between


@dataclass(frozen=True)
class Codebook:
    """A fitted codebook and the distribution it was fitted to.

    Attributes:
        title: for example "layer 0, keys".
        count: [n] share of the calibration values in even bins of [-1, 1].
        weight: [n] share of what an error there weighs in the fit.
        lut: [C] values of the codes.
    """

    title: str
    count: Tensor
    weight: Tensor
    lut: Tensor


def calibration_of(candidate: Candidate, root: Path, weights: str) -> Path | None:
    """The folder that a bundle's parameters were fitted in, None where it is no more.

    Args:
        candidate: a bundle.
        root: folder of the model's calibrations, `artifacts/calibration/<model>`.
        weights: hash of the model's weights, `calibration.weights_hash`.
    """
    facts = candidate.calibration
    if facts is None or facts.sensitivity not in get_args(Sensitivity):
        return None
    for path in sorted(root.glob(f"*/{RECORD}")):
        record = read_record(path.parent)
        same = record.provenance(facts.sensitivity) == facts  # type: ignore[arg-type]
        if same and record.source.weights_hash == weights:
            return path.parent
    return None


def read_codebooks(candidate: Candidate, folder: Path) -> list[Codebook]:
    """Codebooks of keys and values in a few layers of a bundle.

    Args:
        candidate: a bundle.
        folder: what `calibration_of` found.

    Returns:
        Layer by layer, keys before values; empty for a codec without fitted tables.
    """
    assert candidate.spec is not None and candidate.parameters is not None
    assert candidate.calibration is not None
    sensitivity: Sensitivity = candidate.calibration.sensitivity  # type: ignore[assignment]
    record = read_record(folder)
    owners = record.source.base_model.geometry.owners
    shown = {owners[round(i * (len(owners) - 1) / (PANELS - 1))] for i in range(PANELS)}
    books = []
    for layer in sorted(shown):
        stats = read_statistics(folder, record, layer)
        for name, codec in tensor_codecs(candidate.spec.codec.at(layer)):
            lut = candidate.parameters.get(f"layers.{layer}.{name}.lut")
            if lut is None:
                continue
            sums = [
                histogram_for(stats, name, codec.range_fraction, s)[1]
                for s in ("none", sensitivity)
            ]
            count, weight = (x.view(BINS, -1).sum(1) for x in sums)
            title = f"layer {layer}, {'keys' if name == 'k' else 'values'}"
            books.append(Codebook(title, count, weight, lut))
    return books


def plot_codebooks(books: Sequence[Codebook], path: Path, title: str, columns: int = 2) -> None:
    """One panel a codebook: its histogram, and a line at each of its values.

    Args:
        books: row by row.
        path: PNG to write.
        title: above the figure.
        columns: panels a row.
    """
    rows = -(-len(books) // columns)
    size = (6 * columns, 2.1 * rows + 0.9)
    fig, axes = pyplot().subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for ax in axes.flat[len(books) :]:
        ax.set_visible(False)
    for ax, book in zip(axes.flat, books, strict=False):
        edges = [2 * i / len(book.count) - 1 for i in range(len(book.count) + 1)]
        top = 1.08 * float(max(book.count.max(), book.weight.max()))
        ax.stairs(book.count.tolist(), edges, fill=True, color=FILL)
        ax.stairs(book.weight.tolist(), edges, color=OURS[0], linewidth=1.1)
        ax.vlines(book.lut.tolist(), 0, top, color=OTHERS[0], linewidth=1.1)
        ax.set_title(book.title, loc="left", fontsize=10, color=INK)
        ax.set(xlim=(-1.05, 1.05), ylim=(0, top), yticks=[])
        frame(ax)
    for ax in axes[-1]:
        ax.set_xlabel("value in the range of its channel (keys) or token (values)", color=INK)
    legend = "calibration values (filled), their weight in the fit (blue), codebook (orange)"
    save(fig, path, f"{title}: {legend}")
