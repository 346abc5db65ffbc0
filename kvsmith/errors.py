"""The one error sentence: `{where}: {what} must be {expected}, got {actual}. {remedy}`.

Users meet ValueError, TypeError, FileNotFoundError; our own invariants are plain asserts.
"""

from __future__ import annotations


def explain(where: str, what: str, expected: str, actual: object, remedy: str = "") -> str:
    """Compose the one-line error message.

    Args:
        where: dotted configuration path, tensor name or file.
        what: the thing that is wrong.
        expected: what it must be.
        actual: what it is; strings are shown as they are, other objects by repr.
        remedy: what the reader can do about it.

    Returns:
        One line, without a newline at its end.
    """
    shown = actual if isinstance(actual, str) else repr(actual)
    line = f"{where}: {what} must be {expected}, got {shown}."
    return " ".join(f"{line} {remedy}".split())
