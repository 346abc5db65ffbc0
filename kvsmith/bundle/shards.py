"""Tensors of a bundle as safetensors files.

A file is read in the order in which trust grows: size, header, names and shapes, hash, values.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from math import prod
from typing import Any, BinaryIO

import torch

from kvsmith.bundle.errors import refuse
from kvsmith.bundle.manifest import FileInfo
from kvsmith.bundle.strict_json import DAMAGED, read_object
from kvsmith.layout import TensorInfo

HEADER_LIMIT = 2**21  # bytes of a safetensors header
CHUNK = 2**20  # bytes that are hashed at a time
RANK_LIMIT = 8  # dimensions of a weight
_ALIGN = 8
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def encode(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Write tensors as safetensors; equal tensors give equal bytes.

    Args:
        tensors: name -> float32, bfloat16 or float16.

    Returns:
        The file: tensors in the order of their names, the header padded to 8 bytes.
    """
    header, body = {}, bytearray()
    for name in sorted(tensors):
        data = _little(tensors[name].detach().cpu().contiguous())
        header[name] = {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    return len(text).to_bytes(8, "little") + text + bytes(body)


def decode(
    file: BinaryIO,
    info: FileInfo,
    expected: Mapping[str, TensorInfo] | None,
    where: str,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Read one shard; nothing is read before what comes ahead of it has been checked.

    Args:
        file: open for reading; its size has been found to be `info.size`.
        info: size and hash that the manifest gives.
        expected: tensors that this shard may hold; None is any.
        where: path, for errors.
        dtype: of all tensors.

    Returns:
        name -> tensor.

    Raises:
        BundleError: header, name, dtype, shape, offsets or hash.
    """
    length = file.read(8)
    size = int.from_bytes(length, "little")
    if len(length) < 8 or not 2 <= size <= min(HEADER_LIMIT, info.size - 8):
        limit = f"between 2 and {min(HEADER_LIMIT, max(info.size - 8, 2))} bytes"
        raise refuse(where, "header length", limit, size, DAMAGED)
    header = file.read(size)
    if not header.startswith(b"{"):
        raise refuse(where, "header", "a JSON object", repr(header[:8]), DAMAGED)
    body = info.size - 8 - size
    entries = read_object(header, where)
    spans = _check_header(entries, body, expected, dtype, where)
    _check_hash(file, length + header, info, where)
    data = _read_hashed(file, length + header, body, info, where)
    if not spans:
        return {}
    values = _from_little(torch.frombuffer(data, dtype=torch.uint8), dtype)
    each = dtype.itemsize
    return {
        name: values[begin // each : end // each].view(entries[name]["shape"])
        for name, (begin, end) in spans.items()
    }


def _little(tensor: torch.Tensor) -> bytes:
    data = tensor.flatten().view(torch.uint8)
    if sys.byteorder == "big":
        data = data.view(-1, tensor.element_size()).flip(1).flatten()
    return data.numpy().tobytes()


def _from_little(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if sys.byteorder == "big":
        data = data.view(-1, dtype.itemsize).flip(1).flatten()
    return data.view(dtype)


def _check_hash(file: BinaryIO, head: bytes, info: FileInfo, where: str) -> None:
    """Hash a shard of which `head` has been read, a chunk at a time; leaves the file behind it."""
    state, left = hashlib.sha256(head), info.size - len(head)
    while left > 0 and (chunk := file.read(min(CHUNK, left))):
        state.update(chunk)
        left -= len(chunk)
    if (digest := state.hexdigest()) != info.sha256:
        remedy = (
            "The file belongs to another bundle or is damaged; copy or export the bundle again."
        )
        raise refuse(where, "sha256", info.sha256, digest, remedy)
    file.seek(len(head))


def _read_hashed(file: BinaryIO, head: bytes, size: int, info: FileInfo, where: str) -> bytearray:
    """The data of a shard whose hash was right; hashed once more, since the file may change."""
    data = bytearray(size)
    file.readinto(data)  # type: ignore[attr-defined]
    state = hashlib.sha256(head)
    state.update(data)
    if state.hexdigest() != info.sha256:
        raise refuse(where, "file", "at rest", "one that changes while it is read", "Try again.")
    return data


def _check_header(
    header: dict[str, Any],
    size: int,
    expected: Mapping[str, TensorInfo] | None,
    dtype: torch.dtype,
    where: str,
) -> dict[str, tuple[int, int]]:
    """Begin and end of every tensor in the data, which they cover without holes or overlap."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise refuse(where, "__metadata__", "a map of strings", metadata)
    spans = {}
    for name, entry in header.items():
        if expected is not None and name not in expected:
            owned = "one that the codec owns and no other file holds"
            raise refuse(where, "tensor", owned, repr(name))
        shape = None if expected is None else expected[name].shape
        spans[name] = _span(entry, shape, dtype, f"{where}: {name}")
    end = 0
    for name, (begin, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != end:
            raise refuse(f"{where}: {name}", "data offset", str(end), begin, DAMAGED)
        end = stop
    if end != size:
        raise refuse(where, "data", f"{end} bytes long", size, DAMAGED)
    return spans


def _span(
    entry: object, wanted: tuple[int, ...] | None, dtype: torch.dtype, where: str
) -> tuple[int, int]:
    """Begin and end of a tensor whose dtype, shape and size are as expected."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse(where, "entry", "dtype, shape and data_offsets", entry)
    shape, offsets = entry["shape"], entry["data_offsets"]
    if entry["dtype"] != _NAMES[dtype]:
        raise refuse(where, "dtype", _NAMES[dtype], entry["dtype"])
    positive = _integers(shape) and len(shape) <= RANK_LIMIT and min(shape, default=1) > 0
    if not positive or (wanted is not None and tuple(shape) != wanted):
        free = f"at most {RANK_LIMIT} positive integers"
        expected = free if wanted is None else str(list(wanted))
        raise refuse(where, "shape", expected, shape)
    if not _integers(offsets) or len(offsets) != 2:
        raise refuse(where, "data_offsets", "two integers", offsets)
    size = dtype.itemsize * prod(shape)
    if offsets[1] - offsets[0] != size or offsets[0] < 0:
        raise refuse(where, "data_offsets", f"{size} bytes apart", offsets)
    return offsets[0], offsets[1]


def _integers(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int for v in value)
