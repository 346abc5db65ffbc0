"""Codecs by their names in `conf/codec/`.

A name with a hyphen is a preset: it says when to take a codec (`quality-4`), and its file names
that codec.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cache

from kvsmith.bundle import expected_tensors
from kvsmith.errors import explain
from kvsmith.geometry import ModelGeometry
from kvsmith.pipeline.config import conf_folder, read_option
from kvsmith.pipeline.stage import digest
from kvsmith.spec import CacheSpec, CodecSpec
from kvsmith.strict import from_dict


def codec_names() -> list[str]:
    """Names of all codecs, sorted; presets are left out."""
    return [name for name in _names() if "-" not in name]


def preset_names() -> list[str]:
    """Names of all presets, sorted."""
    return [name for name in _names() if "-" in name]


def _names() -> list[str]:
    return sorted(path.stem for path in (conf_folder() / "codec").glob("*.yaml"))


def load_codec(name: str, where: str = "codec") -> CodecSpec:
    """Read `conf/codec/<name>.yaml`.

    Args:
        name: without `.yaml`; a codec or a preset.
        where: configuration path that an error names.

    Raises:
        ValueError: there is no such codec; names near misses.
    """
    names = [*preset_names(), *codec_names()]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=2)
        remedy = f"Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(explain(where, "codec", f"one of {', '.join(names)}", repr(name), remedy))
    return from_dict(CodecSpec, read_option("codec", name), where)


def uncalibrated(name: str, shape: ModelGeometry, where: str) -> CacheSpec:
    """The cache of a codec that needs no calibration.

    Args:
        name: as in `load_codec`.
        shape: the model.
        where: what an error names.

    Raises:
        ValueError: there is no such codec, or it needs a bundle.
    """
    spec = CacheSpec(load_codec(name, where))
    if expected_tensors(spec, shape):
        remedy = f"Run calibrate.py and `export.py codec={name}`, and give the bundle's folder."
        raise ValueError(explain(where, "codec", "one that needs no calibration", name, remedy))
    return spec


def presets(names: Iterable[str] | None = None) -> dict[str, CacheSpec]:
    """Caches of `conf/codec/` by name; None is every codec."""
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
    """Every codec of `conf/codec/`."""
    return {name: load_codec(name) for name in codec_names()}
