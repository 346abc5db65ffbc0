"""`data=pydocs`: the English that every Python installation carries; needs no download.

Four sources, in this order: the language reference (`pydoc_data.topics`), then module by module the
docstrings of the standard library and its longer comments (read from the source files, nothing is
imported), then the docstrings of the interpreter's built-in modules. Code is not part of it, except
where the text quotes it. Each text is cut and split by its content (see `split.py`); the exact
corpus differs a little between Python versions, the split of a text does not.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from kvsmith.pipeline.data.split import Split, cut, split_of

SKIPPED = frozenset(
    {
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "site-packages",
        "dist-packages",
        "__pycache__",
    }
)
MIN_DOCSTRING = 40  # characters; below are one-word labels
MIN_COMMENT = 120  # below is mostly code that was commented out
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class PydocsData:
    """The documentation texts of the running Python; no options."""

    kind: Literal["pydocs"] = "pydocs"


def pydocs_documents(split: Split) -> Iterator[str]:
    """Stream the pieces of one split, in the order of their sources, each text once."""
    yield from (piece for piece in _pieces() if split_of(piece) == split)


@lru_cache(maxsize=1)
def _pieces() -> tuple[str, ...]:
    """All pieces; kept for the process, since parsing the standard library takes seconds."""
    pieces = (piece for text in _texts() for piece in cut(text))
    unique = {" ".join(piece.split()): piece for piece in pieces}
    return tuple(unique.values())


def _texts() -> Iterator[str]:
    topics = importlib.import_module("pydoc_data.topics").topics
    yield from (topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py"), key=lambda p: p.relative_to(library).as_posix()):
        if SKIPPED.isdisjoint(path.relative_to(library).parts):
            yield from _source_texts(path)
    for name in sorted(sys.builtin_module_names):
        yield from _builtin_texts(name)


def _source_texts(path: Path) -> Iterator[str]:
    """Docstrings and longer comments of a file, in the order of their lines."""
    try:
        source = path.read_text("utf-8")
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a template, or not UTF-8
        return
    texts = [
        (_line(node), ast.get_docstring(node) or "")
        for node in ast.walk(tree)
        if isinstance(node, DOCUMENTED)
    ]
    found = [(line, text) for line, text in texts if len(text) >= MIN_DOCSTRING]
    found += [(line, text) for line, text in _comments(source) if len(text) >= MIN_COMMENT]
    yield from (text for _, text in sorted(found))


def _line(node: ast.AST) -> int:
    return getattr(node, "lineno", 0)


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Blocks of at least two comment lines, without their number signs."""
    block: list[str] = []
    for number, line in enumerate([*source.splitlines(), ""]):
        text = line.strip()
        if text.startswith("#") and not text.startswith("#!"):
            block.append(text.lstrip("#").removeprefix(" ").rstrip())
            continue
        if len(block) > 1:
            yield number, "\n".join(block).strip("\n")
        block = []


def _builtin_texts(name: str) -> Iterator[str]:
    """Docstrings of a built-in module, its functions and classes, and the methods of these."""
    module = importlib.import_module(name)
    members = [module, *(vars(module)[key] for key in sorted(vars(module)))]
    for member in members:
        yield from _doc(member)
        if isinstance(member, type):
            for key in sorted(vars(member)):
                yield from _doc(vars(member)[key])


def _doc(member: object) -> Iterator[str]:
    text = getattr(member, "__doc__", None)
    if isinstance(text, str) and len(text) >= MIN_DOCSTRING:
        yield inspect.cleandoc(text)
