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
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from kvsmith.errors import explain
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
    """The documentation texts of the running Python.

    Args:
        packages: installed packages whose docstrings and longer comments join the train split, and
            no other: a model trained on more text is still measured on Python's own.
    """

    kind: Literal["pydocs"] = "pydocs"
    packages: tuple[str, ...] = ()


def pydocs_documents(cfg: PydocsData, split: Split) -> Iterator[str]:
    """Stream the pieces of one split, in the order of their sources, each text once.

    Raises:
        ValueError: a package is not installed.
    """
    pieces = _pieces(cfg.packages if split == "train" else ())
    yield from (piece for piece in pieces if split_of(piece) == split)


@lru_cache(maxsize=2)
def _pieces(packages: tuple[str, ...]) -> tuple[str, ...]:
    """All pieces; kept for the process, since parsing the sources takes seconds."""
    pieces = (piece for text in _texts(packages) for piece in cut(text))
    unique = {" ".join(piece.split()): piece for piece in pieces}
    return tuple(unique.values())


def _texts(packages: tuple[str, ...]) -> Iterator[str]:
    topics = importlib.import_module("pydoc_data.topics").topics
    yield from (topics[name] for name in sorted(topics))
    yield from _folder_texts(Path(sysconfig.get_paths()["stdlib"]))
    for name in sorted(sys.builtin_module_names):
        yield from _builtin_texts(name)
    for name in packages:
        yield from _folder_texts(_package_folder(name))


def _package_folder(name: str) -> Path:
    """Where an installed package lies; it is not imported."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(explain("data.packages", "value", "installed packages", repr(name)))
    return Path(spec.submodule_search_locations[0])


def _folder_texts(folder: Path) -> Iterator[str]:
    """Texts of all source files below a folder, in the order of their paths."""
    for path in sorted(folder.rglob("*.py"), key=lambda p: p.relative_to(folder).as_posix()):
        if SKIPPED.isdisjoint(path.relative_to(folder).parts):
            yield from _source_texts(path)


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
