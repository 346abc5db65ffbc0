"""`data=textfile data.path=...`: a local file or folder of .txt, .jsonl or .parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow
import pyarrow.parquet

from kvsmith.errors import explain
from kvsmith.pipeline.config import input_path
from kvsmith.pipeline.data.split import PIECE_CHARS, Split, cut, split_of

SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class TextfileData:
    """Text of one's own; long documents are cut, and pieces are split by their content.

    Args:
        path: a file, or a folder that is read recursively in the order of names.
        field: field of a .jsonl object, or column of a .parquet table, that holds the text.
        piece_chars: wanted length in characters of the pieces that long documents are cut into.
    """

    kind: Literal["textfile"] = "textfile"
    path: str = ""
    field: str = "text"
    piece_chars: int = PIECE_CHARS

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError(
                explain("data.path", "value", "a file or folder", "nothing", "Add data.path=...")
            )
        if self.piece_chars < 1:
            raise ValueError(explain("data.piece_chars", "value", "at least 1", self.piece_chars))


def textfile_documents(cfg: TextfileData, split: Split) -> Iterator[str]:
    """Stream the pieces of one split.

    Raises:
        FileNotFoundError: the path does not exist, or the folder holds no text file.
        ValueError: a file has another suffix, is not UTF-8, or a line or field of it cannot be
            read.
    """
    for path in _files(cfg):
        for document in _read(path, cfg.field):
            yield from (
                piece for piece in cut(document, cfg.piece_chars) if split_of(piece) == split
            )


def _files(cfg: TextfileData) -> list[Path]:
    path = input_path(cfg.path)
    suffixes = ", ".join(SUFFIXES)
    if not path.exists():
        raise FileNotFoundError(
            explain("data.path", "value", "an existing file or folder", repr(cfg.path))
        )
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(explain("data.path", "file", f"one of {suffixes}", repr(path.name)))
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not found:
        raise FileNotFoundError(
            explain("data.path", "folder", f"one with {suffixes} files", repr(cfg.path))
        )
    return found


def _read(path: Path, field: str) -> Iterator[str]:
    try:
        if path.suffix == ".txt":
            yield path.read_text("utf-8")
        elif path.suffix == ".jsonl":
            yield from _read_jsonl(path, field)
        else:
            yield from _read_parquet(path, field)
    except UnicodeDecodeError as error:
        raise ValueError(
            explain(str(path), "file", "UTF-8 text", f"byte {error.start} that is not")
        ) from error


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _record_text(f"{path} line {number}", line, field)


def _record_text(where: str, line: str, field: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            explain(where, "line", "a JSON object", f"broken JSON ({error.msg})")
        ) from error
    if not isinstance(record, dict):
        raise ValueError(explain(where, "line", "a JSON object", type(record).__name__))
    if field not in record:
        known = ", ".join(map(str, record)) or "none"
        raise ValueError(
            explain(where, "data.field", f"a field of the object ({known})", repr(field))
        )
    if not isinstance(record[field], str):
        raise ValueError(
            explain(where, f"field {field!r}", "a string", type(record[field]).__name__)
        )
    return str(record[field])


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if field not in names:
                expected = f"a column of the table ({', '.join(names)})"
                raise ValueError(explain(str(path), "data.field", expected, repr(field)))
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                yield from (text for text in batch.column(0).to_pylist() if isinstance(text, str))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            explain(str(path), "file", "a whole Parquet file", f"({error})")
        ) from error
