"""The parameters of a bundle as safetensors: their names, their bytes, and what they may hold.

The file is read in the order in which trust grows: size, header, names and shapes, hash, values.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, BinaryIO

import torch

from kvsmith.bundle.errors import refuse
from kvsmith.bundle.manifest import FileInfo
from kvsmith.bundle.strict_json import DAMAGED, read_object
from kvsmith.geometry import ModelGeometry
from kvsmith.layout import TensorInfo, less_parameters, parameter_tensors
from kvsmith.spec import NUQ, CacheSpec, TensorCodec

HEADER_LIMIT = 2**21  # bytes of a safetensors header
CHUNK = 2**20  # bytes that are hashed at a time
_ALIGN = 8
ORTHOGONAL = 1e-3  # largest element of R R^T - I


def expected_tensors(spec: CacheSpec, geometry: ModelGeometry) -> dict[str, TensorInfo]:
    """Every tensor of a bundle: `layers.{i}.{k|v|less}.{name}`, i over the layers with tokens."""
    codecs = {
        f"layers.{i}.{part}.{name}": info
        for i, part, codec, heads, dim in _parts(spec, geometry)
        for name, info in parameter_tensors(codec, heads, dim).items()
    }
    return codecs | less_parameters(spec, geometry)


def encode(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Write float32 tensors as safetensors; equal tensors give equal bytes.

    Args:
        tensors: name -> float32.

    Returns:
        The file: tensors in the order of their names, the header padded to 8 bytes.
    """
    header, body = {}, bytearray()
    for name in sorted(tensors):
        data = tensors[name].detach().cpu().contiguous().numpy().astype("<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensors[name].shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    return len(text).to_bytes(8, "little") + text + bytes(body)


def decode(
    file: BinaryIO, info: FileInfo, expected: Mapping[str, TensorInfo], where: str
) -> dict[str, torch.Tensor]:
    """Read one shard; nothing is read before what comes ahead of it has been checked.

    Args:
        file: open for reading; its size has been found to be `info.size`.
        info: size and hash that the manifest gives.
        expected: tensors that this shard may hold.
        where: path, for errors.

    Returns:
        name -> float32 tensor.

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
    spans = _check_header(read_object(header, where), body, expected, where)
    _check_hash(file, length + header, info, where)
    data = _read_hashed(file, length + header, body, info, where)
    if not spans:
        return {}
    flat = torch.frombuffer(data, dtype=torch.uint8)
    if sys.byteorder == "big":
        flat = flat.view(-1, 4).flip(1).flatten()
    values = flat.view(torch.float32)
    return {n: values[b // 4 : e // 4].view(expected[n].shape) for n, (b, e) in spans.items()}


def check_parameters(
    spec: CacheSpec, geometry: ModelGeometry, tensors: Mapping[str, torch.Tensor], where: str
) -> None:
    """Refuse parameters that no encoder or decoder can work with.

    Args:
        spec: the cache.
        geometry: the model.
        tensors: name -> tensor of the whole bundle.
        where: folder or file, for errors.

    Raises:
        BundleError: a tensor that is missing, unknown, of another dtype or shape, not finite, not
            sorted, not positive, or whose decoded values leave float32.
    """
    expected = expected_tensors(spec, geometry)
    _check_names(tensors.keys(), expected, where)
    for name, info in expected.items():
        tensor = tensors[name]
        if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
            shown = f"{tensor.dtype} {list(tensor.shape)}"
            raise refuse(where, name, f"{info.dtype} {list(info.shape)}", shown)
        if not bool(torch.isfinite(tensor).all()):
            raise refuse(where, name, "finite", "NaN or infinity", "Calibrate again.")
    for i, part, codec, heads, dim in _parts(spec, geometry):
        prefix = f"layers.{i}.{part}"
        own = {n: tensors[f"{prefix}.{n}"] for n in parameter_tensors(codec, heads, dim)}
        _check_values(codec, own, f"{where}: {prefix}")


def _parts(
    spec: CacheSpec, geometry: ModelGeometry
) -> Iterator[tuple[int, str, TensorCodec, int, int]]:
    """(layer, "k" or "v", codec, heads, dim) of everything that stores tokens."""
    for i in geometry.owners:
        layer, codec = geometry.layers[i], spec.codec.at(i)
        yield i, "k", codec.k, layer.kv_heads, layer.k_dim
        yield i, "v", codec.v, layer.kv_heads, layer.v_dim


def _check_values(codec: TensorCodec, own: Mapping[str, torch.Tensor], where: str) -> None:
    remedy = "Calibrate again."
    lut, edges = own.get("lut"), own.get("edges")
    if lut is not None and edges is not None:
        if not bool((lut.diff() > 0).all()):
            raise refuse(where, "lut", "strictly increasing", lut.tolist(), remedy)
        if not bool((edges.diff() >= 0).all()):
            raise refuse(where, "edges", "sorted", edges.tolist(), remedy)
        # Q-Norm shifts the codebook away from the boundaries it was fitted with.
        plain = isinstance(codec.quantizer, NUQ) and not codec.quantizer.q_norm
        if plain and not bool(((lut[:-1] <= edges) & (edges <= lut[1:])).all()):
            raise refuse(where, "edges", "between their neighbours in lut", edges.tolist(), remedy)
    if (turn := own.get("rotation")) is not None:
        off = float((turn @ turn.mT - torch.eye(turn.shape[-1])).abs().max())
        if off > ORTHOGONAL:
            raise refuse(where, "rotation", f"orthogonal to {ORTHOGONAL}", off, remedy)
    scale, zero = own.get("scale"), own.get("zero")
    if scale is None or zero is None:
        return
    if not bool((scale > 0).all()):
        raise refuse(where, "scale", "positive", float(scale.min()), remedy)
    reach = 1.0 if lut is None else max(1.0, float(lut.abs().max()))
    if not bool(torch.isfinite(zero.abs() + scale * reach).all()):
        raise refuse(where, "decoded values", "finite in float32", "infinity", remedy)


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
    header: dict[str, Any], size: int, expected: Mapping[str, TensorInfo], where: str
) -> dict[str, tuple[int, int]]:
    """Begin and end of every tensor in the data, which they cover without holes or overlap."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise refuse(where, "__metadata__", "a map of strings", metadata)
    spans = {}
    for name, entry in header.items():
        if name not in expected:
            owned = "one that the codec owns and no other file holds"
            raise refuse(where, "tensor", owned, repr(name))
        spans[name] = _span(entry, expected[name], f"{where}: {name}")
    end = 0
    for name, (begin, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != end:
            raise refuse(f"{where}: {name}", "data offset", str(end), begin, DAMAGED)
        end = stop
    if end != size:
        raise refuse(where, "data", f"{end} bytes long", size, DAMAGED)
    return spans


def _span(entry: object, info: TensorInfo, where: str) -> tuple[int, int]:
    """Begin and end of a tensor whose dtype, shape and size are as expected."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse(where, "entry", "dtype, shape and data_offsets", entry)
    shape, offsets = entry["shape"], entry["data_offsets"]
    if entry["dtype"] != "F32":
        raise refuse(where, "dtype", "F32", entry["dtype"])
    if not _integers(shape) or tuple(shape) != info.shape:
        raise refuse(where, "shape", str(list(info.shape)), shape)
    if not _integers(offsets) or len(offsets) != 2:
        raise refuse(where, "data_offsets", "two integers", offsets)
    if offsets[1] - offsets[0] != 4 * prod(info.shape) or offsets[0] < 0:
        raise refuse(where, "data_offsets", f"{4 * prod(info.shape)} bytes apart", offsets)
    return offsets[0], offsets[1]


def _integers(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int for v in value)


def _check_names(names: Any, expected: Mapping[str, TensorInfo], where: str) -> None:
    if missing := sorted(expected.keys() - names):
        raise refuse(where, f"tensor {missing[0]}", "present", "nothing", DAMAGED)
    if unknown := sorted(names - expected.keys()):
        raise refuse(where, "tensor", "one that the codec owns", repr(unknown[0]))
