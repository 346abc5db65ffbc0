"""Cutting text into pieces and pieces into splits, by content alone.

A piece's split is read off its SHA-256, so it never depends on what else the corpus holds: the same
paragraph is in the same split under every Python version, and identical pieces are never in two
splits. Long documents are cut first, at paragraphs whose own hash says so; an edit at the start of
a document therefore leaves the cuts after it where they were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal

Split = Literal["train", "calibration", "heldout"]

# Shares in percent, in this order along the hash: train, calibration, heldout.
SHARES: dict[Split, int] = {"train": 84, "calibration": 8, "heldout": 8}
# A piece ends at a chosen paragraph from half of this on, and at any from twice this on.
PIECE_CHARS = 1500


def split_of(text: str) -> Split:
    """The split a piece of text belongs to; a function of its SHA-256 only."""
    place = int.from_bytes(_digest(text)[:8], "big") % 100
    for split, share in SHARES.items():
        place -= share
        if place < 0:
            return split
    raise AssertionError("shares sum to 100")


def cut(text: str, piece_chars: int = PIECE_CHARS) -> Iterator[str]:
    """Cut a document into pieces of whole paragraphs.

    Args:
        text: a document; paragraphs are separated by blank lines, a longer one is cut at line ends
            or by force.
        piece_chars: wanted length in characters; pieces come out between half and about three times
            of it.

    Yields:
        Pieces in order, without blank ends; a short document is one piece.
    """
    piece: list[str] = []
    size = 0
    for paragraph in _paragraphs(text, piece_chars):
        piece.append(paragraph)
        size += len(paragraph)
        chosen = _digest(paragraph)[0] % 4 == 0
        if size >= 2 * piece_chars or (chosen and size >= piece_chars // 2):
            yield "\n\n".join(piece)
            piece, size = [], 0
    if piece:
        yield "\n\n".join(piece)


def _paragraphs(text: str, piece_chars: int) -> Iterator[str]:
    paragraph: list[str] = []
    size = 0
    for line in text.splitlines():
        blank = not line.strip()
        if paragraph and (blank or size + len(line) > piece_chars):
            yield "\n".join(paragraph)
            paragraph, size = [], 0
        if blank:
            continue
        while len(line) > 2 * piece_chars:
            yield line[:piece_chars]
            line = line[piece_chars:]
        paragraph.append(line.rstrip())
        size += len(line)
    if paragraph:
        yield "\n".join(paragraph)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
