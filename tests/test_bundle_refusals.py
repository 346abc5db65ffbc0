"""What a bundle is refused for, and that the refusal is one line with the place and the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kvsmith
from kvsmith.bundle import Bundle
from kvsmith.bundle.manifest import CARD, MANIFEST, SHARD
from kvsmith.bundle.shards import encode
from tests.golden import (
    GEOMETRY,
    GOLDEN,
    copy_golden,
    golden_base,
    golden_bundle,
    golden_parameters,
    golden_spec,
    refusal,
    reseal,
)

ROOT = Path(__file__).resolve().parents[1]


def damaged(tmp_path: Path, change: Callable[[Path], object]) -> str:
    folder = copy_golden(tmp_path / "b")
    change(folder)
    message = refusal(lambda: kvsmith.load(folder))
    assert str(tmp_path) in message
    return message


def test_an_absent_bundle(tmp_path: Path) -> None:
    assert "existing folder" in refusal(lambda: kvsmith.load(tmp_path / "none"))
    assert f"{MANIFEST}: file must be present" in refusal(lambda: kvsmith.load(tmp_path))


@pytest.mark.parametrize("name", [SHARD, CARD])
def test_a_missing_file(name: str, tmp_path: Path) -> None:
    assert f"{name}: file must be present" in damaged(tmp_path, lambda f: (f / name).unlink())


@pytest.mark.parametrize("kept", [0, 7, 8, 100, 1200, 1559])
def test_a_truncated_shard(kept: int, tmp_path: Path) -> None:
    data = (GOLDEN / SHARD).read_bytes()[:kept]
    message = damaged(tmp_path, lambda f: (f / SHARD).write_bytes(data))
    assert f"{SHARD}: size must be 1560 bytes, got {kept}. The file is damaged" in message


def test_a_shard_of_another_bundle(tmp_path: Path) -> None:
    other = {n: t * 0.5 for n, t in golden_parameters(golden_spec(), GEOMETRY).items()}
    message = damaged(tmp_path, lambda f: (f / SHARD).write_bytes(encode(other)))
    assert f"{SHARD}: sha256 must be" in message and "another bundle" in message


def test_a_changed_card(tmp_path: Path) -> None:
    text = (GOLDEN / CARD).read_text().replace("perplexity", "PERPLEXITY")
    assert f"{CARD}: sha256" in damaged(tmp_path, lambda f: (f / CARD).write_text(text))


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"", "valid JSON"),
        (b"\xff\xfe{}", "valid JSON"),
        (b"[1]", "a JSON object"),
        (b"{", "valid JSON"),
        (b"{}", "got None. This folder holds something else"),
        (b'{"format": "gguf"}', "This folder holds something else"),
        (b'{"a": 1, "a": 1}', "'a' occurs twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "valid JSON"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "at most 32 levels deep, got 41"),
        (b"[" * 500_000, "levels deep"),
        (b'{"' + b'\\"' * 400_000, "valid JSON"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b" " * 2**20 + b"{}", "size must be at most 1048576 bytes"),
    ],
)
def test_a_manifest_that_is_not_one(raw: bytes, what: str, tmp_path: Path) -> None:
    message = damaged(tmp_path, lambda f: (f / MANIFEST).write_bytes(raw))
    assert MANIFEST in message and what in message


def test_a_manifest_edited_by_hand(tmp_path: Path) -> None:
    text = (GOLDEN / MANIFEST).read_text().replace('"recent": 8', '"recent": 9')
    assert "was edited" in damaged(tmp_path, lambda f: (f / MANIFEST).write_text(text))


def at(*path: Any, value: Any = None, drop: bool = False) -> Callable[[dict[str, Any]], None]:
    """A change of one place of the manifest."""

    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        if drop:
            del data[path[-1]]
        else:
            data[path[-1]] = value

    return change


Q = ("cache", "codec", "k", "quantizer")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (at("format_version", value=2), "at most 1, got 2. Install a newer kvsmith"),
        (at("format_version", value=True), "a positive integer, got True"),
        (at("format_version", value="1"), "a positive integer, got 1"),
        (at("created", value=1), "key must be one of"),
        (at("cache", "codec", "sink", value=1), "Did you mean sinks?"),
        (at("cache", "codec", "sinks", drop=True), "key 'sinks' must be present"),
        (at("calibration", drop=True), "key 'calibration' must be present"),
        (at("quality", "perplexity", value="12"), "quality.perplexity"),
        (at("quality", value=[]), "a mapping"),
        (at(*Q, "kind", value="pickle"), "one of identity, uniform, nuq"),
        (at(*Q, "bits", value=4), "edges: shape must be [15], got [7]"),
        (at(*Q, "bits", value=60), "between 1 and 8"),
        (at(*Q, "range", value="online"), "range calibrated|static_threshold|group_size"),
        (at(*Q, "table", value="nf"), "one that the codec owns"),
        (at("cache", "codec", "v", "outliers", "fraction", value=0.5), "in [0, 0.5)"),
        (at("cache", "codec", "sinks", value=2**40), "at most 1048576 tokens"),
        (at("cache", "page_size", value=2**40), "at most 1048576 tokens"),
        (at("cache", "page_size", value=12), "multiple of block_size"),
        (at("base_model", "layers", 0, "k_dim", value=32), "config_hash"),
        (at("base_model", "layers", 0, "k_dim", value=10**9), "at most 65536"),
        (at("base_model", "layers", value=[]), "layers"),
        (at("base_model", "owner", value=[0, 1, 2]), "one entry a layer (2)"),
        (at("base_model", "owner", value=[0, 5]), "owner"),
        (at("base_model", "id", value=""), "non-empty"),
        (at("base_model", "config_hash", value="0" * 64), "config_hash: hash must be"),
        (at("files", SHARD, "size", value=-1), "at least 0"),
        (at("files", SHARD, "size", value=10**30), "size of all must be at most 1073741824"),
        (at("files", SHARD, "size", value=2**30), "size of all must be at most 1073741824"),
        (at("files", SHARD, "size", value=2**29), "size must be 536870912 bytes, got 1560"),
        (at("files", SHARD, "sha256", value="x"), "64 hexadecimal digits"),
        (at("files", SHARD, drop=True), "tensor layers.0.k.edges must be present"),
        (at("files", "../../x.safetensors", value={"sha256": "0" * 64, "size": 1}), "file name"),
        (at("files", "/x.safetensors", value={"sha256": "0" * 64, "size": 1}), "file name"),
        (at("files", "a\n.safetensors", value={"sha256": "0" * 64, "size": 1}), "file name"),
        (at("files", MANIFEST, value={"sha256": "0" * 64, "size": 1}), "file name"),
        (at("files", "model.pkl", value={"sha256": "0" * 64, "size": 1}), "file name"),
        (at("files", "x\x1b[2J", value={"sha256": "0" * 64, "size": 1}), "file name"),
    ],
)
def test_a_manifest_that_is_sealed_and_still_wrong(
    change: Callable[[dict[str, Any]], None], what: str, tmp_path: Path
) -> None:
    message = damaged(tmp_path, lambda folder: reseal(folder, change))
    assert any(part in message for part in what.split("|")), message


def header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit the safetensors header, and make everything fit again."""
    raw = (folder / SHARD).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    data = json.loads(raw[8:end])
    change(data)
    text = json.dumps(data).encode()
    (folder / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    reseal(folder)


LUT = "layers.0.k.lut"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda h: h.pop(LUT), "data offset must be"),
        (lambda h: h.update({"extra": h[LUT]}), "one that the codec owns"),
        (lambda h: h.update({"extra": h.pop(LUT)}), "one that the codec owns"),
        (lambda h: h[LUT].update(dtype="F16"), "dtype must be F32"),
        (lambda h: h[LUT].update(dtype=["F32"]), "dtype must be F32"),
        (lambda h: h[LUT].update(shape=[2, 4]), "shape must be [8]"),
        (lambda h: h[LUT].update(shape=[True]), "shape must be [8]"),
        (lambda h: h[LUT].update(shape=8), "shape must be [8]"),
        (lambda h: h[LUT].update(data_offsets=[0, 10**12]), "32 bytes apart"),
        (lambda h: h[LUT].update(data_offsets=[-32, 0]), "32 bytes apart"),
        (lambda h: h[LUT].update(data_offsets=h["layers.1.k.lut"]["data_offsets"]), "data offset"),
        (lambda h: h[LUT].update(code="import os"), "dtype, shape and data_offsets"),
        (lambda h: h.update({LUT: None}), "dtype, shape and data_offsets"),
        (lambda h: h.update(__metadata__={"a": 1}), "a map of strings"),
    ],
)
def test_a_header_that_lies(
    change: Callable[[dict[str, Any]], object], what: str, tmp_path: Path
) -> None:
    assert what in damaged(tmp_path, lambda folder: header(folder, change))


def test_what_cannot_be_written_is_refused_when_it_is_made() -> None:
    parameters = golden_parameters(golden_spec(), GEOMETRY)
    make = lambda **given: Bundle.create(golden_spec(), parameters, golden_base(), **given)  # noqa: E731
    assert "finite" in refusal(lambda: make(quality={"perplexity": float("nan")}))
    assert "surrogates" in refusal(lambda: make(created_by="\ud800"))


def test_metadata_of_a_shard_is_ignored(tmp_path: Path) -> None:
    folder = copy_golden(tmp_path / "b")
    header(folder, lambda h: h.update(__metadata__={"format": "pt"}))
    assert torch.equal(kvsmith.load(folder).parameters[LUT], golden_bundle().parameters[LUT])


@pytest.mark.parametrize("length", [0, 1, 1553, 2**40, 2**64 - 1])
def test_a_header_length_that_lies(length: int, tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        raw = (folder / SHARD).read_bytes()
        (folder / SHARD).write_bytes(length.to_bytes(8, "little") + raw[8:])
        reseal(folder)

    assert "header" in damaged(tmp_path, change)


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("layers.1.v.edges", torch.tensor([0.0, float("nan"), 1.0]), "finite"),
        ("layers.0.k.scale", torch.full((2, 16), float("inf")), "finite"),
        ("layers.0.k.scale", torch.zeros(2, 16), "scale must be positive, got 0.0"),
        ("layers.0.k.scale", torch.full((2, 16), -1.0), "positive"),
        ("layers.0.k.zero", torch.full((2, 16), 3.4e38), None),
        ("layers.0.k.scale", torch.full((2, 16), 3.4e38), None),
        ("layers.0.v.lut", torch.tensor([0.0, 0.0, 1.0, 2.0]), "strictly increasing"),
        ("layers.0.v.edges", torch.tensor([0.0, -1.0, 1.0]), "sorted"),
        ("layers.0.k.edges", torch.zeros(7), "between their neighbours"),
        ("layers.0.k.lut", torch.zeros(8, dtype=torch.float64), "torch.float32 [8]"),
        ("layers.0.k.lut", torch.zeros(9), "torch.float32 [8], got torch.float32 [9]"),
        ("layers.0.k.lut", None, "tensor layers.0.k.lut must be present"),
        ("layers.7.k.lut", torch.zeros(8), "one that the codec owns"),
    ],
)
def test_parameters_that_cannot_work(
    name: str, value: torch.Tensor | None, what: str | None
) -> None:
    parameters = golden_parameters(golden_spec(), GEOMETRY)
    if value is None:
        del parameters[name]
    else:
        parameters[name] = value
    make: Callable[[], object] = lambda: Bundle.create(golden_spec(), parameters, golden_base())  # noqa: E731
    if what is None:
        make()  # large and finite
        parameters["layers.0.k.scale"] = parameters["layers.0.k.zero"] = torch.full((2, 16), 3e38)
        what = "finite in float32"
    assert what in refusal(make)
