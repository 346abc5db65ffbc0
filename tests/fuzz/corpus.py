"""Sound bundles that damage starts from, as files in memory, and how an attacker seals them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from kvsmith.bundle import Bundle, Calibration, Delta, base_model
from kvsmith.bundle.manifest import MANIFEST, seal, write_manifest
from kvsmith.bundle.shards import encode
from kvsmith.geometry import LayerGeometry, ModelGeometry
from kvsmith.spec import CacheSpec
from tests.golden import GOLDEN, INT4, contents, golden_base, golden_parameters, golden_spec

Kind = Literal["link", "fifo", "socket", "folder", "absent"]


@dataclass(frozen=True)
class Odd:
    """Something in the folder that is no file with content.

    Attributes:
        kind: what it is; "absent" is nothing at all.
        target: of a link.
    """

    kind: Kind
    target: str = ""


Files = dict[str, bytes]
Entries = dict[str, bytes | Odd]


@dataclass(frozen=True)
class Case:
    """One damaged bundle.

    Attributes:
        name: the kind of damage.
        entries: the whole folder.
        honest: checksums are those of the sound bundle; then loading must give its content.
    """

    name: str
    entries: Entries
    honest: bool


@cache
def corpus() -> tuple[Files, ...]:
    """The golden bundle, one of odd shapes in two shards, one without tensors, one with a delta."""
    return contents(GOLDEN), _odd_shapes(), _without_tensors(), _with_delta()


def _files(bundle: Bundle) -> Files:
    return {MANIFEST: write_manifest(bundle.manifest), **bundle._contents()}


def _odd_shapes() -> Files:
    """Keys wider than values, a window, a layer that reads another's tokens, two shards."""
    layers = (
        LayerGeometry(kv_heads=1, query_heads=3, k_dim=24, v_dim=8),
        LayerGeometry(kv_heads=2, query_heads=4, k_dim=8, v_dim=16, window=32),
        LayerGeometry(kv_heads=2, query_heads=4, k_dim=8, v_dim=16),
    )
    geometry = ModelGeometry(layers, (0, 1, 1))
    keys = {"kind": "uniform", "bits": 4, "axis": "channel", "range": "calibrated"}
    values = {"kind": "nuq", "bits": 1, "axis": "token", "group_size": 8}
    codec = {"k": {"quantizer": keys}, "v": {"quantizer": values}, "block_size": 16}
    spec = CacheSpec.parse({"codec": codec})
    config = {"model_type": "gemma", "hidden_size": 24, "rope_parameters": {"rope_theta": 1e6}}
    base = base_model(config, geometry, "owner/odd", "a" * 40)
    calibration = Calibration("text", "1", 0, 4, 64, "ab" * 32, "none")
    parameters = golden_parameters(spec, geometry)
    files = _files(Bundle.create(spec, parameters, base, calibration, {"x": -1.5}))
    names = sorted(parameters)
    parts = {"a.safetensors": names[::2], "b-2.safetensors": names[1::2]}
    shards = {f: encode({n: parameters[n] for n in part}) for f, part in parts.items()}
    return sealed(json.loads(files[MANIFEST]), shards)


def _without_tensors() -> Files:
    return _files(Bundle.create(CacheSpec.parse(INT4), {}, golden_base()))


def _with_delta() -> Files:
    weights = {
        "model.norm.weight": torch.arange(-3.0, 4.0).bfloat16(),
        "model.layers.0.q.weight": torch.linspace(-1, 1, 15).view(3, 5).bfloat16(),
        "scalar": torch.tensor(0.5).bfloat16(),
    }
    delta = Delta("owner/base", "b" * 40, "cd" * 32, "bfloat16")
    spec, base = golden_spec(), golden_base()
    calibration = Calibration("text", "1", 0, 4, 64, "ab" * 32, "none")
    own = golden_parameters(spec, base.geometry)
    return _files(Bundle.create(spec, own, base, calibration, delta=delta, weights=weights))


def info(content: bytes) -> dict[str, Any]:
    """An entry of `files`."""
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def sealed(data: dict[str, Any], files: Files) -> Files:
    """A folder of `files` whose manifest holds `data` with hashes and checksum that fit."""
    listed = {name: info(content) for name, content in files.items()}
    return {**files, MANIFEST: seal_data({**data, "files": listed})}


def seal_data(data: dict[str, Any]) -> bytes:
    """The manifest that holds `data`, with a checksum that fits."""
    return seal({name: value for name, value in data.items() if name != "checksum"})


def resealed(raw: bytes) -> bytes:
    """Make the checksum of a mangled manifest fit, where it still has one."""
    start = raw.find(b'"checksum": "') + 13
    zeros = b"0" * 64
    blank = raw[:start] + zeros + raw[start + 64 :]
    return raw[:start] + hashlib.sha256(blank).hexdigest().encode() + raw[start + 64 :]


def split(files: Files) -> tuple[dict[str, Any], Files]:
    """The manifest as plain data without its checksum, and the other files."""
    data = json.loads(files[MANIFEST])
    del data["checksum"]
    return data, {name: content for name, content in files.items() if name != MANIFEST}


def shard_names(files: Files) -> list[str]:
    return [name for name in files if name.endswith(".safetensors")]


def fingerprint(base: dict[str, Any]) -> str:
    """What `config_hash` must be, by the sentence of docs/FORMAT.md."""
    parts = {name: base[name] for name in ("architecture", "layers", "owner", "rope")}
    text = json.dumps(_integral(parts), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _integral(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _integral(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_integral(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
