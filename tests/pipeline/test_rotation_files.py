"""Rotation files become bundles; torch's archives are read without running anything."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import kvsmith
from kvsmith.hf import geometry
from kvsmith.pipeline.config import load
from kvsmith.pipeline.export import ExportConfig, run
from kvsmith.pipeline.interop.pickles import read_torch
from kvsmith.pipeline.interop.rotations import read_rotations
from kvsmith.spec import CodecSpec, TensorCodec, Uniform
from tests.micro_model import write_model

GIVEN = TensorCodec(Uniform(bits=2), rotation="given")
CODEC = CodecSpec(GIVEN, GIVEN, key_domain="post")


def save(path: Path, value: Any) -> Path:
    torch.save(value, path)  # noqa: TID251 - what is read here must be written somewhere
    return path


def matrices(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.linalg.qr(torch.randn((*shape, 16, 16), generator=generator))[0].contiguous()


@pytest.mark.parametrize(
    "form", ["stack", "heads", "list", "dict", "named", "nested", "safetensors"]
)
def test_every_form_is_read(form: str, tmp_path: Path, micro_llama: Callable[..., Any]) -> None:
    shape = geometry(micro_llama().config)
    whole = matrices(2, 2) if form == "heads" else matrices(2)
    value = {
        "stack": whole,
        "heads": whole,
        "list": list(whole.double()),
        "dict": dict(enumerate(whole)),
        "named": {f"model.layers.{i}.R": m for i, m in enumerate(whole)},
        "nested": {"rotations": {0: whole[0], 1: whole[1]}},
        "safetensors": {f"layer_{i}": m.clone() for i, m in enumerate(whole)},
    }[form]
    path = tmp_path / ("r.safetensors" if form == "safetensors" else "r.pt")
    if form == "safetensors":
        save_file(value, path)  # type: ignore[arg-type]
    else:
        save(path, value)
    found = read_rotations((path, path), CODEC, shape)
    assert set(found) == {f"layers.{i}.{n}.rotation" for i in (0, 1) for n in "kv"}
    for i in (0, 1):
        expected = whole[i].expand(2, 16, 16)
        assert torch.equal(found[f"layers.{i}.k.rotation"], expected)


class Calls:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_what_an_archive_may_hold(tmp_path: Path) -> None:
    value = {"a": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "n": [1, "x"]}
    found = read_torch(save(tmp_path / "p", value))
    assert torch.equal(found["a"], value["a"]) and found["n"] == [1, "x"]
    with pytest.raises(ValueError, match="type must be a number, .* got posix.system"):
        read_torch(save(tmp_path / "p", {"a": Calls()}))
    whole = save(tmp_path / "p", value).read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 30):
        (tmp_path / "p").write_bytes(whole[:cut])
        with pytest.raises(ValueError) as error:
            read_torch(tmp_path / "p")
        assert str(error.value).startswith(str(tmp_path / "p")) and "\n" not in str(error.value)


def test_export_makes_a_bundle_that_runs(tmp_path: Path, micro_llama: Callable[..., Any]) -> None:
    model = write_model(tmp_path / "m", micro_llama)
    path = save(tmp_path / "r.pt", matrices(2))
    overrides = [f"model.path={model}", "codec=oscar2", f"rotations=[{path},{path}]"]
    overrides += ["codec.k.quantizer.group_size=16", "codec.v.quantizer.group_size=16"]
    folder = run(load(ExportConfig, "export", [*overrides, f"bundles={tmp_path}"]), tmp_path / "r")
    bundle = kvsmith.load(folder)
    assert "rotations" in bundle.manifest.created_by and len(bundle.parameters) == 4
    loaded = micro_llama(vocab=257, eos_token_id=256, pad_token_id=256)
    ids = torch.randint(3, 97, (1, 80))
    assert loaded(ids, past_key_values=bundle.cache(loaded), use_cache=True).logits.isfinite().all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (matrices(1), r"layer 1: rotation must be present"),
        (
            torch.zeros(2, 8, 8),
            r"layer 0: rotation must be \[16, 16\], or one for each of 2",
        ),
        ({"x": 1, "y": 2}, "content must be matrices by layer, got none"),
        (3.5, "content must be matrices by layer, got float"),
    ],
)
def test_files_that_do_not_fit(
    value: Any, message: str, tmp_path: Path, micro_llama: Callable[..., Any]
) -> None:
    path = save(tmp_path / "p", value)
    with pytest.raises(ValueError, match=message):
        read_rotations((path, path), CODEC, geometry(micro_llama().config))


def test_a_codec_without_rotations_is_refused(
    tmp_path: Path, micro_llama: Callable[..., Any]
) -> None:
    plain = TensorCodec(Uniform(bits=2))
    with pytest.raises(ValueError, match=r"rotations: codec must be one that takes them"):
        files = (tmp_path / "a", tmp_path / "b")
        read_rotations(files, CodecSpec(plain, plain), geometry(micro_llama().config))
