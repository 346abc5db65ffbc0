"""What a bundle from a stranger can cost before it is refused: memory and time at their worst."""

from __future__ import annotations

import hashlib
import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kvsmith
from kvsmith.bundle import BundleError, base_model, expected_tensors
from kvsmith.bundle.manifest import MANIFEST, SIZE_LIMIT, seal
from kvsmith.bundle.shards import CHUNK, HEADER_LIMIT
from kvsmith.geometry import LayerGeometry, ModelGeometry
from kvsmith.spec import CacheSpec
from kvsmith.strict import to_dict
from tests.fuzz.corpus import fingerprint, split
from tests.golden import GOLDEN, contents, golden_bundle, golden_parameters

MIB = 2**20
JSON_MEMORY = 80 * MIB  # any text within the limits of a manifest or a header


def refused(folder: Path) -> tuple[str, int]:
    """The refusal, and the peak of memory that Python took meanwhile, bytes."""
    tracemalloc.start()
    try:
        with pytest.raises(BundleError) as caught:
            kvsmith.load(folder)
        return str(caught.value), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def wide_model(layers: int, heads: int, dim: int) -> dict[str, Any]:
    """The golden manifest for a model of another shape, as plain data."""
    data, _ = split(contents(GOLDEN))
    geometry = ModelGeometry((LayerGeometry(heads, heads, dim, dim),) * layers)
    data["base_model"] = to_dict(base_model({"model_type": "llama"}, geometry, "wide"))
    data["base_model"]["config_hash"] = fingerprint(data["base_model"])
    return data


def header_of(infos: dict[str, Any]) -> tuple[bytes, int]:
    """A right safetensors header for tensors in this order, and the bytes of their data."""
    header, end = {}, 0
    for name, info in infos.items():
        begin, end = end, end + info.nbytes
        header[name] = {"dtype": "F32", "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text, end


def written(folder: Path, data: dict[str, Any], name: str, head: bytes, size: int) -> Path:
    """A bundle with one shard that begins with `head` and goes on with zeros that take no disk."""
    folder.mkdir()
    (folder / name).write_bytes(head)
    os.truncate(folder / name, size)
    data["files"] = {name: {"sha256": "0" * 64, "size": size}}
    (folder / MANIFEST).write_bytes(seal(data))
    return folder


@pytest.mark.parametrize("length", [0, 2, 2**21, 2**21 + 1, 2**29, 2**62, 2**64 - 1])
def test_a_huge_shard_whose_header_length_lies(length: int, tmp_path: Path) -> None:
    data = wide_model(1, 1, 16)
    head = length.to_bytes(8, "little") + b"{}"
    message, peak = refused(written(tmp_path / "b", data, "a.safetensors", head, 900 * MIB))
    assert "header" in message or "data must be" in message or "valid JSON" in message
    assert peak < (5 if length == 2**21 else 2) * MIB


@pytest.mark.parametrize("layers", [1, 100])
def test_a_shape_that_is_huge_and_a_file_that_is_not(layers: int, tmp_path: Path) -> None:
    """The manifest asks for 32 GiB a tensor; nothing of that is allocated."""
    data = wide_model(layers, 65536, 65536)
    data["cache"]["codec"]["k"]["outliers"] = data["cache"]["codec"]["v"]["outliers"] = None
    data["cache"]["codec"]["v"]["quantizer"]["q_norm"] = False
    name = "layers.0.k.scale"
    info = {"dtype": "F32", "shape": [65536, 65536], "data_offsets": [0, 2**34]}
    text = json.dumps({name: info}).encode()
    head = len(text).to_bytes(8, "little") + text
    message, peak = refused(written(tmp_path / "b", data, "a.safetensors", head, 900 * MIB))
    assert "data must be 17179869184 bytes long" in message and peak < 4 * MIB


def test_memory_for_values_comes_after_their_hash(tmp_path: Path) -> None:
    """A shard of 640 MiB that is sound up to its hash costs one chunk of the hashing."""
    data = wide_model(5, 256, 32768)
    data["cache"]["codec"]["k"]["outliers"] = None
    data["cache"]["codec"]["v"]["outliers"] = None
    spec = CacheSpec.parse(data["cache"])
    geometry = ModelGeometry((LayerGeometry(256, 256, 32768, 32768),) * 5)
    head, size = header_of(expected_tensors(spec, geometry))
    assert size > 300 * MIB
    folder = written(tmp_path / "b", data, "a.safetensors", head, len(head) + size)
    message, peak = refused(folder)
    assert "sha256 must be 000" in message and peak < 4 * CHUNK


def test_files_of_more_than_a_gibibyte_are_not_opened(tmp_path: Path) -> None:
    data = wide_model(1, 1, 16)
    folder = written(tmp_path / "b", data, "a.safetensors", b"", 0)
    listed = {f"{i}.safetensors": {"sha256": "0" * 64, "size": 2**29} for i in range(3)}
    (folder / MANIFEST).write_bytes(seal({**data, "files": listed}))
    message, peak = refused(folder)
    assert "size of all must be at most 1073741824 bytes" in message and peak < 2 * MIB


BOMBS: dict[str, Callable[[int], bytes]] = {
    "lists": lambda size: b'{"a":[' + b"[]," * (size // 3 - 4) + b"0]}",
    "objects": lambda size: b'{"a":[' + b"{}," * (size // 3 - 4) + b"0]}",
    "members": lambda size: b'{"a":[' + b'{"":0},' * (size // 7 - 3) + b"0]}",
    "keys": lambda size: b"{" + b",".join(b'"%06x":[]' % i for i in range(size // 12 - 1)) + b"}",
    "floats": lambda size: b'{"a":[' + b"0.5," * (size // 4 - 3) + b"0]}",
    "integers": lambda size: b'{"a":[' + b"9999," * (size // 5 - 3) + b"0]}",
    "long integers": lambda size: b'{"a":[' + (b"9" * 4299 + b",") * (size // 4300 - 1) + b"0]}",
    "strings": lambda size: b'{"a":[' + b'"\\u1234\\u5678",' * (size // 15 - 2) + b"0]}",
    "one string": lambda size: b'{"a":"' + b"\\ud83d\\ude00" * (size // 12 - 2) + b'"}',
    "escapes": lambda size: b'{"a":"' + b'\\"' * (size // 2 - 8) + b'"}',
    "open strings": lambda size: b'{"a":' + b'"\\' * (size // 2 - 8),
    "brackets": lambda size: b"{" + b"[" * (size - 2),
    "zigzag": lambda size: b"{" + b"[]" * (size // 2 - 2),
    "spaces": lambda size: b'{"a":0' + b" " * (size - 8) + b"}",
    "digits": lambda size: b'{"a":0.' + b"1" * (size - 9) + b"}",
}


def planted(bomb: str, place: str, folder: Path) -> Path:
    """A bundle whose manifest, or whose header, is the bomb."""
    text = BOMBS[bomb](SIZE_LIMIT if place == "manifest" else HEADER_LIMIT)
    if place == "header":
        head = len(text).to_bytes(8, "little") + text
        return written(folder / "b", wide_model(1, 1, 16), "a.safetensors", head, len(head))
    (folder / MANIFEST).write_bytes(text)
    return folder


@pytest.mark.parametrize("bomb", sorted(BOMBS))
@pytest.mark.parametrize("place", ["manifest", "header"])
def test_json_of_the_largest_size_is_refused_in_time(bomb: str, place: str, tmp_path: Path) -> None:
    folder = planted(bomb, place, tmp_path)
    began = time.process_time()
    with pytest.raises(BundleError):
        kvsmith.load(folder)
    assert time.process_time() - began < 5


@pytest.mark.slow
@pytest.mark.parametrize("bomb", ["lists", "members", "keys", "one string", "open strings"])
def test_json_of_the_largest_size_takes_bounded_memory(bomb: str, tmp_path: Path) -> None:
    _, peak = refused(planted(bomb, "header", tmp_path))
    assert peak < JSON_MEMORY, f"{peak / MIB:.0f} MiB"


@pytest.mark.slow
def test_time_is_linear_in_layers_and_files(tmp_path: Path) -> None:
    """3000 layers in two shards, and 500 shards that hold nothing."""
    data = wide_model(3000, 1, 1)
    spec = CacheSpec.parse(data["cache"])
    geometry = ModelGeometry((LayerGeometry(1, 1, 1, 1),) * 3000)
    infos = expected_tensors(spec, geometry)
    single = golden_parameters(spec, ModelGeometry(geometry.layers[:1]))
    names, files = list(infos), {}
    for i in range(2):
        part = names[i::2]
        head, _ = header_of({n: infos[n] for n in part})
        own = [single[".".join(("layers.0", *n.split(".")[2:]))] for n in part]
        body = torch.cat([t.flatten() for t in own]).numpy().tobytes()
        files[f"{i}.safetensors"] = head + body
    files |= {f"e{i}.safetensors": (2).to_bytes(8, "little") + b"{}" for i in range(500)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    data["files"] = {
        n: {"sha256": hashlib.sha256(c).hexdigest(), "size": len(c)} for n, c in files.items()
    }
    raw = json.dumps(json.loads(seal(data)), sort_keys=True, separators=(",", ":")).encode()
    start = raw.find(b'"checksum":"') + 12
    blank = raw[:start] + b"0" * 64 + raw[start + 64 :]
    digest = hashlib.sha256(blank).hexdigest().encode()
    (tmp_path / MANIFEST).write_bytes(blank[:start] + digest + blank[start + 64 :])
    began = time.process_time()
    bundle = kvsmith.load(tmp_path)
    assert len(bundle.parameters) == 3000 * 6
    assert time.process_time() - began < 6


def test_what_is_loaded_takes_one_copy() -> None:
    """Tensors of a shard share the one buffer that was read."""
    loaded = kvsmith.load(GOLDEN).parameters
    assert len({t.untyped_storage().data_ptr() for t in loaded.values()}) == 1
    assert all(torch.equal(t, golden_bundle().parameters[n]) for n, t in loaded.items())
