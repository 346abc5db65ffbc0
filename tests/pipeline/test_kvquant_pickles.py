"""KVQuant's quantizers are read without running anything, and nothing else is read."""

from __future__ import annotations

import os
import pickle  # noqa: TID251 - what is read here must be written somewhere
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvsmith
from kvsmith.hf import geometry
from kvsmith.pipeline.config import load
from kvsmith.pipeline.export import ExportConfig, run
from kvsmith.pipeline.fit.thresholds import affine
from kvsmith.pipeline.interop.kvquant import read_quantizers
from kvsmith.pipeline.interop.pickles import read_pickle
from kvsmith.spec import NUQ, CodecSpec, StaticThreshold, TensorCodec, TopK
from tests.micro_model import write_model

CODEC = CodecSpec(
    TensorCodec(NUQ(bits=2, axis="channel", range="calibrated"), StaticThreshold(0.05)),
    TensorCodec(NUQ(bits=2), TopK(0.05)),
)


def quantizers(layers: int = 2, width: int = 32, size: int = 4, norm: bool = False) -> Any:
    """What KVQuant's program makes: thresholds as tensors, codebooks as arrays."""
    generator = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for i in range(layers):
        for name, count in (("k_proj", width), ("v_proj", 64)):
            upper = torch.tensor(generator.uniform(1, 2, count)).unsqueeze(0)
            lower = torch.tensor(generator.uniform(-2, -1, count)).unsqueeze(0)
            book = generator.permutation(np.linspace(-0.9, 0.9, size, dtype=np.float32))
            entry: tuple[Any, ...] = (upper, lower, [book.reshape(-1, 1)])
            if norm:
                entry += (torch.tensor(1.1), torch.tensor(0.01))
            made[f"model.layers.{i}.self_attn.{name}"] = entry
    return made


def save(path: Path, value: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_arrays_and_tensors_are_read_as_written(protocol: int, tmp_path: Path) -> None:
    half = torch.arange(12, dtype=torch.float16).view(3, 4).T  # strides of a transpose
    value = {
        "a": (1, -2, 2**70, 0.5, True, None, "x", b"\x00\xff", [], {}, ()),
        "array": np.arange(6, dtype="<f8").reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6, dtype="<f4").reshape(2, 3)),
        "scalar": np.float32(0.25),
        "tensor": half,
        "slice": torch.arange(10)[3:7],
        "empty": torch.zeros(0),
    }
    found = read_pickle(save(tmp_path / "p", value, protocol))
    assert found["a"] == value["a"] and found["scalar"] == 0.25
    assert torch.equal(found["array"], torch.from_numpy(value["array"]))
    assert torch.equal(found["columns"], torch.arange(6.0).view(2, 3))
    for name in ("tensor", "slice", "empty"):
        assert torch.equal(found[name], value[name]) and found[name].dtype == value[name].dtype


class Calls:
    """A pickle that would run a command."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self._reduced


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Calls(os.system, "touch ran"), "posix.system"),
        (Calls(eval, "1"), "builtins.eval"),
        (Calls(np.load, "x"), "numpy.load"),
        ({"a": [Path("x")]}, r"pathlib\S*"),
        (torch.nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
        (np.array([object()]), "builtins.object"),
        (complex(1, 2), "builtins.complex"),
    ],
)
def test_anything_else_is_refused_and_named(value: Any, named: str, tmp_path: Path) -> None:
    path = save(tmp_path / "p", value)
    with pytest.raises(ValueError, match=f"type must be a number, .* got {named}") as error:
        read_pickle(path)
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


def test_known_names_do_nothing_but_what_they_are_for(tmp_path: Path) -> None:
    reduce = b"\x80\x04\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94\x93\x94)R."
    (tmp_path / "p").write_bytes(reduce)
    assert read_pickle(tmp_path / "p") == OrderedDict() == {}
    # A number is called, a persistent identifier outside of a storage, a call of a type.
    for raw in (
        b"\x80\x04K\x01)R.",
        b"\x80\x04K\x01Q.",
        b"\x80\x04\x8c\x05numpy\x8c\x07ndarray\x93)R.",
    ):
        (tmp_path / "p").write_bytes(raw)
        with pytest.raises(ValueError, match="Only quantizers as KVQuant writes them"):
            read_pickle(tmp_path / "p")


def test_damage_is_one_line(tmp_path: Path) -> None:
    raw = pickle.dumps(quantizers(), protocol=4)
    generator = np.random.default_rng(1)
    for trial in range(400):
        broken = bytearray(raw[: generator.integers(0, len(raw))] if trial % 2 else raw)
        for _ in range(3):
            if broken:
                broken[generator.integers(0, len(broken))] = generator.integers(0, 256)
        (tmp_path / "p").write_bytes(broken)
        try:
            read_pickle(tmp_path / "p")
        except ValueError as error:
            assert str(error).startswith(str(tmp_path / "p")) and "\n" not in str(error)
    with pytest.raises(FileNotFoundError, match="file must be present"):
        read_pickle(tmp_path / "q")


def test_quantizers_become_parameters(tmp_path: Path, micro_llama: Callable[..., Any]) -> None:
    shape, made = geometry(micro_llama().config), quantizers()
    found = read_quantizers(save(tmp_path / "p", made), CODEC, shape)
    upper, lower, (book,) = made["model.layers.1.self_attn.k_proj"]
    scale, zero = affine(lower[0], upper[0])
    assert torch.equal(found["layers.1.k.scale"], scale.view(2, 16))
    assert torch.equal(found["layers.1.k.zero"], zero.view(2, 16))
    assert found["layers.1.k.lut"].tolist() == sorted(book.ravel().tolist())
    assert set(found) == {
        f"layers.{i}.{n}"
        for i in (0, 1)
        for n in ("k.lut", "k.edges", "k.scale", "k.zero", "v.lut", "v.edges")
    }
    normed = TensorCodec(NUQ(bits=2, q_norm=True))
    shifted = read_quantizers(
        save(tmp_path / "n", quantizers(norm=True)), CodecSpec(normed, normed), shape
    )
    expected = found["layers.0.v.lut"] * 1.1 + 0.01
    assert torch.allclose(shifted["layers.0.v.lut"], expected)
    assert torch.equal(shifted["layers.0.v.edges"], found["layers.0.v.edges"])


def test_export_makes_a_bundle_that_runs(
    tmp_path: Path, micro_llama: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "m", micro_llama)
    path = save(tmp_path / "quantizers.pickle", quantizers(size=16))
    overrides = [f"model.path={model}", "codec=kvquant_nuq4_o1", f"quantizers={path}"]
    folder = run(load(ExportConfig, "export", [*overrides, f"bundles={tmp_path}"]), tmp_path / "r")
    bundle = kvsmith.load(folder)
    assert bundle.manifest.calibration is None
    assert "quantizers of KVQuant" in bundle.manifest.created_by
    loaded = micro_llama(vocab=257, eos_token_id=256, pad_token_id=256)
    ids = torch.randint(3, 97, (1, 80))
    assert loaded(ids, past_key_values=bundle.cache(loaded), use_cache=True).logits.isfinite().all()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([1, 2], "content must be a dict of quantizers, got list"),
        ({"a": 1}, "content must be quantizers of k_proj and v_proj, got none"),
        (quantizers(layers=1), r"layers\.1\.k: quantizer must be present, got nothing"),
        (quantizers(width=16), r"layers\.0\.k: thresholds must be 32 channels, got 16"),
        (quantizers(size=8), r"layers\.0\.k: codebook must be 4 values, got 8\. Export with"),
        (quantizers(norm=True), "quantizer must be one without Q-Norm, got the other"),
    ],
)
def test_quantizers_that_do_not_fit(
    made: Any, message: str, tmp_path: Path, micro_llama: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_quantizers(save(tmp_path / "p", made), CODEC, geometry(micro_llama().config))
    assert "\n" not in str(error.value)
