"""Codecs by their names in `conf/codec/`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cache

from kvsmith.errors import explain
from kvsmith.pipeline.config import compose, conf_folder
from kvsmith.pipeline.stage import digest
from kvsmith.spec import CacheSpec, CodecSpec
from kvsmith.strict import from_dict


def codec_names() -> list[str]:
    """Names of all codecs, sorted."""
    return sorted(path.stem for path in (conf_folder() / "codec").glob("*.yaml"))


def load_codec(name: str, where: str = "codec") -> CodecSpec:
    """Read `conf/codec/<name>.yaml`.

    Args:
        name: without `.yaml`.
        where: configuration path that an error names.

    Raises:
        ValueError: there is no such codec; names near misses.
    """
    names = codec_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=2)
        remedy = f"Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(explain(where, "codec", f"one of {', '.join(names)}", repr(name), remedy))
    return from_dict(CodecSpec, compose(f"codec/{name}")["codec"], where)


def presets(names: Iterable[str] | None = None) -> dict[str, CacheSpec]:
    """Caches of `conf/codec/` by name; None is all of them."""
    known = _known() if names is None else {n: load_codec(n, "codecs") for n in names}
    return {name: CacheSpec(codec) for name, codec in known.items()}


def codec_name(codec: CodecSpec) -> str:
    """The name of the file in `conf/codec/` that describes a codec.

    Returns:
        The name; `custom-<hash8>` for a codec that no file describes, such as one changed on the
        command line.
    """
    for name, known in _known().items():
        if known == codec:
            return name
    return f"custom-{digest(codec)[:8]}"


def codec_word(codec: CodecSpec) -> str:
    """As `codec_name`, where windows and block size may differ from the file's."""

    def stored(c: CodecSpec) -> tuple[object, ...]:
        return (c.k, c.v, c.key_domain, c.store_dtype, c.layers)

    for name, known in _known().items():
        if stored(known) == stored(codec):
            return name
    return codec_name(codec)


@cache
def _known() -> dict[str, CodecSpec]:
    """Every codec of `conf/codec/`; composing them takes most of a second."""
    return {name: load_codec(name) for name in codec_names()}
