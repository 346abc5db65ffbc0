"""The one exception that a bundle is refused with."""

from __future__ import annotations

from kvsmith.errors import explain

SHOWN = 160


class BundleError(ValueError):
    """A bundle cannot be read, written or used; one line that says what, where and what to do."""


def refuse(where: str, what: str, expected: str, actual: object, remedy: str = "") -> BundleError:
    """Compose a BundleError; see `kvsmith.errors.explain` for the sentence.

    What comes from a file may be long or hold control characters: it is cut and made printable.
    """
    shown = actual if isinstance(actual, str) else repr(actual)
    if len(shown) > SHOWN:
        shown = f"{shown[:SHOWN]}..."
    return BundleError(printable(explain(where, what, expected, shown, remedy)))


def printable(text: str, limit: int = 1000) -> str:
    """`text` as one line of printable characters, cut at `limit`."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= limit else f"{line[:limit]}..."
