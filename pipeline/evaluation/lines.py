"""Files of JSON lines, each an object with some texts."""

from __future__ import annotations

import json
from pathlib import Path

from kvsmith.errors import explain


def read_lines(path: Path, what: str, keys: tuple[str, str]) -> list[tuple[str, str]]:
    """The two texts of every line that is not empty.

    Args:
        path: the file.
        what: the option that names it, for messages.
        keys: names of the texts.

    Raises:
        FileNotFoundError, ValueError: no such file, or a line that lacks a text.
    """
    if not path.is_file():
        raise FileNotFoundError(explain(what, "file", "of JSON lines", repr(str(path))))
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        expected = f"an object with texts {keys[0]!r} and {keys[1]!r}"
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(explain(where, "content", expected, "no JSON")) from error
        first, second = (data.get(k) if isinstance(data, dict) else None for k in keys)
        if not (isinstance(first, str) and isinstance(second, str) and first and second):
            raise ValueError(explain(where, "content", expected, "another"))
        found.append((first, second))
    return found
