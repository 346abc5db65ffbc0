"""The bundle in artifacts/golden/bundle-v1: version 1 of the format, kept forever.

`python -m tests.golden` wrote it once. It is never written again: what changes with a later version
of the format gets a golden bundle of its own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvsmith.bundle import BaseModel, Bundle, BundleError, Calibration, base_model, expected_tensors
from kvsmith.bundle.manifest import MANIFEST, seal
from kvsmith.geometry import LayerGeometry, ModelGeometry
from kvsmith.layout import TensorInfo
from kvsmith.spec import CacheSpec

GOLDEN = Path(__file__).resolve().parents[1] / "artifacts" / "golden" / "bundle-v1"
GEOMETRY = ModelGeometry((LayerGeometry(kv_heads=2, query_heads=4, k_dim=16, v_dim=16),) * 2)
SPEC = {
    "codec": {
        "k": {
            "quantizer": {"kind": "nuq", "bits": 3, "axis": "channel", "range": "calibrated"},
            "outliers": {"kind": "static_threshold", "fraction": 0.05},
        },
        "v": {
            "quantizer": {"kind": "nuq", "bits": 2, "axis": "token", "q_norm": True},
            "outliers": {"kind": "top_k", "fraction": 0.1},
        },
        "sinks": 1,
        "recent": 8,
        "block_size": 8,
    },
    "page_size": 32,
}

INT4 = {"codec": {"k": {"quantizer": {"kind": "uniform"}}, "v": {"quantizer": {"kind": "uniform"}}}}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def refusal(call: Callable[[], object]) -> str:
    """The message of a refusal, which is one line of printable characters."""
    with pytest.raises(BundleError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1200
    return message


def golden_spec() -> CacheSpec:
    return CacheSpec.parse(SPEC)


def golden_base() -> BaseModel:
    """A Llama of two layers, as its configuration describes it."""
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "vocab_size": 97,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }
    return base_model(config, GEOMETRY, "golden-micro")


def golden_parameters(spec: CacheSpec, geometry: ModelGeometry) -> dict[str, torch.Tensor]:
    """Valid parameters of any codec, exact in float32: the same on every machine."""
    tensors = {}
    for name, info in expected_tensors(spec, geometry).items():
        _, layer, part, kind = name.split(".")
        tensors[name] = _tensor(kind, info, 2 * int(layer) + (part == "v"))
        if kind == "lut" and getattr(spec.codec, part).quantizer.q_norm:
            tensors[name] = tensors[name] * 1.25 + 0.125
    return tensors


def golden_bundle() -> Bundle:
    spec = golden_spec()
    calibration = Calibration("golden", None, 7, 16, 128, "0123456789abcdef" * 4, "fisher")
    parameters = golden_parameters(spec, GEOMETRY)
    quality = {"perplexity": 12.5, "kld_mean": 0.03125}
    return Bundle.create(spec, parameters, golden_base(), calibration, quality, "kvsmith 0.1.0")


def copy_golden(folder: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(GOLDEN, folder)


def reseal(folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Edit the manifest as an attacker would: sizes, hashes and the checksum fit again."""
    data = json.loads((folder / MANIFEST).read_text("utf-8"))
    for name in data["files"]:
        content = (folder / name).read_bytes()
        data["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    if change is not None:
        change(data)
    data.pop("checksum", None)
    (folder / MANIFEST).write_bytes(seal(data))


def _tensor(kind: str, info: TensorInfo, shift: int) -> torch.Tensor:
    steps = torch.arange(info.nbytes // 4, dtype=torch.float64)
    if kind == "scale":
        values = (1 + (steps * 5 + shift) % 13) / 8
    elif kind == "zero":
        values = ((steps * 3 + shift) % 11 - 5) / 16
    elif kind == "lut":
        values = _levels(len(steps), shift)
    else:
        levels = _levels(len(steps) + 1, shift)
        values = (levels[1:] + levels[:-1]) / 2
    return values.reshape(info.shape).float()


def _levels(count: int, shift: int) -> torch.Tensor:
    """Levels between -1 and 1, denser in the middle; `count` is a power of two."""
    steps = (2 * torch.arange(count, dtype=torch.float64) - count + 0.5) / count
    return (steps**3 * (1 - shift / 64)).float().double()


if __name__ == "__main__":
    golden_bundle().save_pretrained(GOLDEN)
