"""The bundle: golden file, round trips, what is refused and how it says so."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import kvsmith
from kvsmith.bundle import Bundle, base_model, expected_tensors
from kvsmith.bundle.manifest import CARD, MANIFEST, SHARD
from kvsmith.bundle.shards import encode
from kvsmith.geometry import LayerGeometry, ModelGeometry
from kvsmith.layout import parameter_tensors
from kvsmith.spec import CacheSpec
from tests.golden import (
    GEOMETRY,
    GOLDEN,
    contents,
    copy_golden,
    golden_base,
    golden_bundle,
    golden_parameters,
    golden_spec,
    refusal,
    reseal,
)

ROOT = Path(__file__).resolve().parents[1]
GOLDEN_SHA256 = {
    CARD: "28d5e63779885885bc99d2008dd459a449538598670cc60913e44f4fc250b435",
    SHARD: "57486cc9b7ad2e713fb96d7815316a04415387a217f9ba65f6c333e9be1e2040",
    MANIFEST: "1dd21946b0e261e4db99baf0a031ae10e1bfe7f1a5897c113d8f6ac57667b032",
}


# -- golden ---------------------------------------------------------------------------------------


def test_the_golden_bundle_is_as_it_was_written() -> None:
    found = {n: hashlib.sha256(d).hexdigest() for n, d in contents(GOLDEN).items()}
    assert found == GOLDEN_SHA256


def test_the_golden_bundle_loads_with_its_values() -> None:
    bundle, made = kvsmith.load(GOLDEN), golden_bundle()
    assert bundle.spec == golden_spec()
    assert replace(bundle.manifest, files={}) == replace(made.manifest, files={})
    assert bundle.parameters.keys() == made.parameters.keys()
    for name, tensor in bundle.parameters.items():
        assert torch.equal(tensor, made.parameters[name])
    # A few by hand, so that a change of the helper shows.
    assert bundle.parameters["layers.0.k.scale"][0, :3].tolist() == [0.125, 0.75, 1.375]
    assert bundle.parameters["layers.1.k.zero"][1, -1].item() == 0.125
    assert bundle.parameters["layers.0.k.lut"][0].item() == -0.823974609375


def test_writing_the_golden_bundle_back_gives_its_bytes(tmp_path: Path) -> None:
    kvsmith.load(GOLDEN).save_pretrained(tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(GOLDEN)


# -- round trips ----------------------------------------------------------------------------------


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    parameters = golden_parameters(golden_spec(), GEOMETRY)
    backwards = dict(reversed(parameters.items()))
    for name, given in (("a", parameters), ("b", backwards)):
        Bundle.create(golden_spec(), given, golden_base()).save_pretrained(tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    data = json.loads((tmp_path / "a" / MANIFEST).read_text("utf-8"))
    assert not re.search(r"20\d\d-\d\d", json.dumps(data))


def test_the_shard_is_what_the_safetensors_library_reads() -> None:
    parameters = golden_parameters(golden_spec(), GEOMETRY)
    read = safetensors.torch.load(encode(parameters))
    assert read.keys() == parameters.keys()
    assert all(torch.equal(read[name], parameters[name]) for name in parameters)


def test_values_survive_whatever_memory_layout_they_had(tmp_path: Path) -> None:
    parameters = golden_parameters(golden_spec(), GEOMETRY)
    name = "layers.0.k.scale"
    parameters[name] = parameters[name].t().contiguous().t().requires_grad_()
    assert not parameters[name].is_contiguous()
    Bundle.create(golden_spec(), parameters, golden_base()).save_pretrained(tmp_path / "b")
    read = kvsmith.load(tmp_path / "b").parameters[name]
    assert torch.equal(read, parameters[name]) and not read.requires_grad


@pytest.mark.parametrize("kind", ["identity", "uniform"])
def test_a_codec_without_parameters_needs_no_shard(kind: str, tmp_path: Path) -> None:
    part = {"quantizer": {"kind": kind}}
    spec = CacheSpec.parse({"codec": {"k": part, "v": part}})
    Bundle.create(spec, {}, golden_base()).save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "b").keys() == {MANIFEST, CARD}
    bundle = kvsmith.load(tmp_path / "b")
    assert bundle.spec == spec and bundle.parameters == {} and bundle.manifest.calibration is None


def test_layers_of_different_shape_and_shared_layers(tmp_path: Path) -> None:
    layers = (LayerGeometry(2, 4, 16, 32), LayerGeometry(1, 4, 32, 16, window=64))
    geometry = ModelGeometry((*layers, layers[0]), (0, 1, 0))
    base = base_model({"model_type": "x"}, geometry, "owner/model", "abc")
    parameters = golden_parameters(golden_spec(), geometry)
    assert not any(name.startswith("layers.2.") for name in parameters)
    Bundle.create(golden_spec(), parameters, base).save_pretrained(tmp_path / "b")
    bundle = kvsmith.load(tmp_path / "b")
    assert bundle.manifest.base_model.geometry == geometry
    assert bundle.parameters["layers.1.k.scale"].shape == (1, 32)
    assert 'base_model: "owner/model"' in bundle.card


def test_tensors_may_be_spread_over_shards(tmp_path: Path) -> None:
    folder = copy_golden(tmp_path / "b")
    parameters = golden_parameters(golden_spec(), GEOMETRY)
    names = sorted(parameters)
    (folder / SHARD).unlink()
    (folder / "keys-1.safetensors").write_bytes(encode({n: parameters[n] for n in names[:5]}))
    (folder / "rest.safetensors").write_bytes(encode({n: parameters[n] for n in names[5:]}))
    empty = {"sha256": "0" * 64, "size": 0}
    shards = {n: empty for n in (CARD, "keys-1.safetensors", "rest.safetensors")}
    data = json.loads((folder / MANIFEST).read_text("utf-8"))
    (folder / MANIFEST).write_text(json.dumps({**data, "files": shards}))
    reseal(folder)
    read = kvsmith.load(folder).parameters
    assert all(torch.equal(read[n], parameters[n]) for n in names)
    (folder / "rest.safetensors").write_bytes(encode({n: parameters[n] for n in names[4:]}))
    reseal(folder)
    assert "and no other file holds" in refusal(lambda: kvsmith.load(folder))


def test_a_card_holds_what_a_reader_wants_to_know() -> None:
    card = golden_bundle().card
    for text in ("library_name: kvsmith", "past_key_values=cache", "| tokens | 1K | 32K | 1M |"):
        assert text in card
    for text in ("nuq 3 bits", "static threshold", "16 sequences of 128 tokens", "`perplexity`"):
        assert text in card
    assert all(line.isascii() for line in card.splitlines())


# -- use with a model -----------------------------------------------------------------------------


def test_the_cache_of_a_bundle_generates(micro_llama: Any, tmp_path: Path) -> None:
    from kvsmith.hf import geometry

    model = micro_llama()
    base = base_model(model.config.to_dict(), geometry(model.config), "micro")
    parameters = golden_parameters(golden_spec(), base.geometry)
    folder = Bundle.create(golden_spec(), parameters, base).save_pretrained(tmp_path / "b")
    cache = kvsmith.load(folder).cache(model)
    prompt = torch.arange(2, 42)[None]
    tokens = model.generate(prompt, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert tokens.shape == (1, 48) and cache.get_seq_length() == 47 and cache.nbytes() > 0
    kvsmith.load(folder).cache(model)  # a second cache of the same model


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"layers": 3}, "layer count must be 2, got 3"),
        ({"kv_heads": 4}, "kv_heads (layer 0) must be 2, got 4"),
        ({"head_dim": 8}, "query_heads|k_dim"),
        ({"heads": 8}, "query_heads (layer 0) must be 4, got 8"),
        ({"vocab": 98}, "vocab_size must be 97, got 98"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters"),
    ],
)
def test_a_wrong_base_model_is_named(micro_llama: Any, other: dict[str, Any], what: str) -> None:
    from kvsmith.hf import geometry

    model = micro_llama()
    base = base_model(model.config.to_dict(), geometry(model.config), "micro-2")
    bundle = Bundle.create(golden_spec(), golden_parameters(golden_spec(), base.geometry), base)
    message = refusal(lambda: bundle.cache(micro_llama(**other)))
    assert any(part in message for part in what.split("|"))
    assert "made for micro-2" in message


def test_the_fingerprint_survives_saving_the_model(micro_llama: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig

    from kvsmith.hf import geometry

    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000}
    config = micro_llama(rope_parameters=rope).config
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    hashes = [base_model(c.to_dict(), geometry(c), "m").config_hash for c in (config, read)]
    assert hashes[0] == hashes[1]


# -- documents and packaging ----------------------------------------------------------------------


def test_the_format_page_lists_the_tensors_that_there_are() -> None:
    page = (ROOT / "docs" / "FORMAT.md").read_text("utf-8")
    listed = set(re.findall(r"^\| `layers\.\{i\}\.\{p\}\.(\w+)` \| \[", page, re.MULTILINE))
    spec = golden_spec().codec
    turned = replace(spec.v, rotation="given")
    sides = (spec.k, spec.v, turned)
    assert listed == {name for side in sides for name in parameter_tensors(side, 2, 16)}
    names = {n.rpartition(".")[2] for n in expected_tensors(golden_spec(), GEOMETRY)}
    assert listed == names | {"rotation"}


def test_the_format_page_lists_the_fields_that_there_are() -> None:
    page = (ROOT / "docs" / "FORMAT.md").read_text("utf-8")
    words = set(re.findall(r"`([\w.]+)`", page))
    data = json.loads((GOLDEN / MANIFEST).read_text("utf-8"))
    names = {*data, *data["base_model"], *data["base_model"]["layers"][0], *data["calibration"]}
    names |= {f"codec.{n}" for n in ("k", "v", "key_domain", "store_dtype", "sinks")}
    names |= {"recent", "block_size", "eviction", "page_size", "sha256", "size"}
    names |= {*data["cache"]["codec"]["k"]["quantizer"], *data["base_model"]["architecture"]}
    assert names <= words


def test_importing_kvsmith_leaves_transformers_alone() -> None:
    program = "import sys, kvsmith; kvsmith.load(sys.argv[1]); print('transformers' in sys.modules)"
    command = [sys.executable, "-c", program, str(GOLDEN)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
