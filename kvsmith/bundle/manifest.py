"""manifest.json: what a bundle is. docs/FORMAT.md is normative; this is its reader and writer."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from kvsmith.bundle.base_model import BaseModel
from kvsmith.bundle.delta import Delta
from kvsmith.bundle.errors import BundleError, printable, refuse
from kvsmith.bundle.strict_json import DAMAGED, read_object
from kvsmith.eviction.policy import KeepAll
from kvsmith.layout import check_geometry
from kvsmith.spec import CacheSpec
from kvsmith.strict import added_later, from_dict, to_dict

MANIFEST, CARD, SHARD = "manifest.json", "README.md", "cache.safetensors"
FORMAT: Literal["kvsmith-bundle"] = "kvsmith-bundle"
VERSION: Literal[1] = 1
SIZE_LIMIT = 2**20  # bytes of manifest.json
TOKENS_LIMIT = 2**20  # any token count of the cache
FILES_LIMIT = 2**30  # bytes of all other files together, but for those of a delta
DELTA_LIMIT = 2**36  # bytes of those
_SHARD_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UNSEALED = "0" * 64


@dataclass(frozen=True)
class FileInfo:
    """One file of the folder.

    Attributes:
        sha256: 64 hexadecimal digits.
        size: bytes.
    """

    sha256: str
    size: int


@dataclass(frozen=True)
class Calibration:
    """Where the parameters come from.

    Attributes:
        dataset: name of the text.
        revision: version of the text, None where it has none.
        seed: of the choice of sequences.
        samples: sequences.
        length: tokens of a sequence.
        tokens_hash: SHA-256 of the token ids.
        sensitivity: weights of the codebook fit, for example "fisher" or "none".
    """

    dataset: str
    revision: str | None
    seed: int
    samples: int
    length: int
    tokens_hash: str
    sensitivity: str


@dataclass(frozen=True)
class Manifest:
    """The whole of manifest.json but its checksum.

    Attributes:
        format: always "kvsmith-bundle".
        format_version: of docs/FORMAT.md.
        created_by: program and version.
        base_model: the model that the cache belongs to.
        cache: what the cache is.
        calibration: None for a codec without parameters.
        files: every other file of the bundle by name.
        quality: measured numbers by name, may be empty.
        delta: how the base model comes from another one; None where it is a model of its own.
    """

    format: Literal["kvsmith-bundle"]
    format_version: Literal[1]
    created_by: str
    base_model: BaseModel
    cache: CacheSpec
    calibration: Calibration | None
    files: dict[str, FileInfo]
    quality: dict[str, float]
    delta: Delta | None = added_later(None)


def write_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json: sorted keys, two spaces, UTF-8, a newline at the end."""
    return seal(to_dict(manifest))


def seal(data: dict[str, Any]) -> bytes:
    """Write plain data with its checksum: SHA-256 of the file in which the checksum is 64 zeros."""
    whole = {**data, "checksum": _UNSEALED}
    try:
        raw = json.dumps(whole, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
        blank = f"{raw}\n".encode()
    except ValueError as error:  # NaN, or half a character
        reason = f"({printable(str(error), 120)})"
        raise refuse(MANIFEST, "content", "valid Unicode and finite", reason) from None
    field = b'\n  "checksum": "%s"'  # with this indent it can only be the top level's
    zeros, digest = _UNSEALED.encode(), hashlib.sha256(blank).hexdigest().encode()
    return blank.replace(field % zeros, field % digest, 1)


def read_manifest(raw: bytes, where: str) -> Manifest:
    """Check and read manifest.json.

    Args:
        raw: the file.
        where: its path, for errors.

    Returns:
        The manifest; names, limits and the fit of codec and model are checked, the files are not.

    Raises:
        BundleError: anything that docs/FORMAT.md does not allow.
    """
    if len(raw) > SIZE_LIMIT:
        raise refuse(where, "size", f"at most {SIZE_LIMIT} bytes", len(raw))
    data = read_object(raw, where)
    _check_version(data, where)
    _check_seal(data.pop("checksum", None), raw, where)
    try:
        manifest = from_dict(Manifest, data, where)
    except (ValueError, TypeError) as error:
        text = str(error)
        raise BundleError(
            printable(text if text.startswith(where) else f"{where}: {text}")
        ) from None
    _check_complete(to_dict(manifest), data, where)
    check_manifest(manifest, where)
    return manifest


def check_manifest(manifest: Manifest, where: str) -> None:
    """Refuse a manifest whose fields are well-typed and still not allowed.

    Raises:
        BundleError: a file name, a hash, a limit, or a codec that does not fit the model.
    """
    for name, info in manifest.files.items():
        if name != CARD and not _SHARD_NAME.fullmatch(name):
            expected = f"{CARD} or a plain name in lower case that ends in .safetensors"
            raise refuse(where, "file name", expected, repr(name))
        if not _SHA256.fullmatch(info.sha256):
            raise refuse(f"{where}.files.{name}", "sha256", "64 hexadecimal digits", info.sha256)
        if info.size < 0:
            raise refuse(f"{where}.files.{name}", "size", "at least 0", info.size)
    changed = () if manifest.delta is None else manifest.delta.files
    if lacking := [n for n in changed if n not in manifest.files or n == CARD]:
        raise refuse(f"{where}.delta.files", "name", "that of a shard in files", lacking[0])
    sizes = {name: info.size for name, info in manifest.files.items()}
    own = sum(sizes.pop(name) for name in changed)
    for total, limit in ((sum(sizes.values()), FILES_LIMIT), (own, DELTA_LIMIT)):
        if total > limit:
            raise refuse(f"{where}.files", "size of all", f"at most {limit} bytes", total)
    for what, count in _counts(manifest.cache):
        if count > TOKENS_LIMIT:
            unit = "" if what in ("rank", "hidden") else " tokens"
            raise refuse(f"{where}.cache", what, f"at most {TOKENS_LIMIT}{unit}", count)
    try:
        check_geometry(manifest.cache, manifest.base_model.geometry)
    except ValueError as error:
        raise BundleError(printable(f"{where}: {error}")) from None


def _counts(cache: CacheSpec) -> list[tuple[str, int]]:
    """Every size that memory depends on, by name."""
    codec, policy, less = cache.codec, cache.eviction, cache.less
    counts = [(name, getattr(codec, name)) for name in ("sinks", "block_size")]
    counts += [("recent", codec.most_recent), ("page_size", cache.page_size)]
    if not isinstance(policy, KeepAll):
        counts += [("budget", policy.budget), ("sinks", policy.sinks)]
    if less is not None:
        counts += [("rank", rank) for rank in (less.rank, *less.ranks)]
        counts.append(("hidden", getattr(less.features, "hidden", 0)))
    return counts


def _check_version(data: dict[str, Any], where: str) -> None:
    if data.get("format") != FORMAT:
        remedy = "This folder holds something else than a kvsmith bundle."
        raise refuse(where, "format", repr(FORMAT), data.get("format"), remedy)
    version = data.get("format_version")
    if type(version) is not int or version < 1:
        raise refuse(where, "format_version", "a positive integer", version, DAMAGED)
    if version > VERSION:
        remedy = "Install a newer kvsmith, or export the bundle with this one."
        raise refuse(where, "format_version", f"at most {VERSION}", version, remedy)


def _check_seal(checksum: object, raw: bytes, where: str) -> None:
    if not isinstance(checksum, str) or not _SHA256.fullmatch(checksum):
        raise refuse(where, "checksum", "64 hexadecimal digits", checksum, DAMAGED)
    if raw.count(checksum.encode()) != 1:
        raise refuse(where, "checksum", "in the file once", raw.count(checksum.encode()), DAMAGED)
    blank = raw.replace(checksum.encode(), _UNSEALED.encode())
    if (actual := hashlib.sha256(blank).hexdigest()) != checksum:
        remedy = "The file was edited or damaged; copy, download or export the bundle again."
        raise refuse(where, "checksum of the content", checksum, actual, remedy)


def _check_complete(whole: Any, data: Any, where: str) -> None:
    """A field that the reader would have to guess is an error, also where it has a default."""
    if isinstance(whole, dict):
        for key, value in whole.items():
            if key not in data:
                raise refuse(where, f"key {key!r}", "present", "nothing")
            _check_complete(value, data[key], f"{where}.{key}")
    elif isinstance(whole, list):
        for i, value in enumerate(whole):
            _check_complete(value, data[i], f"{where}[{i}]")
