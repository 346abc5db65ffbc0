"""export.py format=compressed-tensors: what the library of that name reads, and what it does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from kvsmith.geometry import LayerGeometry, ModelGeometry
from kvsmith.pipeline import calibrate, export
from kvsmith.pipeline.calibration import amax, collect_amax
from kvsmith.pipeline.config import load
from kvsmith.pipeline.data import TextfileData, token_blocks
from kvsmith.pipeline.export import ExportConfig
from kvsmith.pipeline.fp8_checkpoint import (
    INDEX,
    SCALES,
    WEIGHTS,
    Checkpoint,
    scales_of,
)
from tests.micro_model import write_model, write_text

LAYERS = 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, micro_llama: Callable[..., Any]) -> Path:
    """A folder with a model, and a calibration of it."""
    root = tmp_path_factory.mktemp("fp8")
    write_model(root / "micro", micro_llama, kv_heads=2, heads=4, head_dim=32, layers=LAYERS)
    write_text(root / "text.txt")
    given = ["samples=6", "length=64", "batch_size=4", f"folder={root}/calibration", "codecs=[]"]
    calibrate.run(load(calibrate.CalibrateConfig, "calibrate", [*inputs(root), *given]), root / "l")
    return root


def inputs(place: Path) -> list[str]:
    return [f"model.path={place}/micro", "data=textfile", f"data.path={place}/text.txt"]


def exported(place: Path, *given: str) -> Path:
    places = [f"calibrations={place}/calibration", f"checkpoints={place}/checkpoints"]
    overrides = [*inputs(place), *places, "format=compressed-tensors", *given]
    return export.run(load(ExportConfig, "export", overrides), place / "logs")


@pytest.fixture(scope="module")
def checkpoint(place: Path) -> Path:
    return exported(place)


def tokens(place: Path) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(place / "micro")
    text = TextfileData(path=str(place / "text.txt"))
    return token_blocks(tokenizer, text, "calibration", 6, 64, seed=0)


def cached(model: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys (after RoPE) and values of each layer, as transformers caches them."""
    with torch.no_grad():
        layers = model(ids, use_cache=True).past_key_values.layers
    return [(layer.keys, layer.values) for layer in layers]


def test_the_library_parses_the_configuration(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    parsed = QuantizationConfig.model_validate(config["quantization_config"])
    scheme = parsed.kv_cache_scheme
    assert scheme is not None and not parsed.config_groups
    assert (scheme.num_bits, scheme.type, scheme.strategy) == (8, "float", "tensor")
    assert scheme.symmetric and scheme.dynamic is False


def test_scales_are_the_largest_magnitudes_after_rope(place: Path, checkpoint: Path) -> None:
    scales = load_file(checkpoint / SCALES)
    model = AutoModelForCausalLM.from_pretrained(place / "micro", dtype=torch.float32)
    assert len(scales) == 2 * LAYERS
    for i, pair in enumerate(cached(model, tokens(place))):
        for part, x in zip("kv", pair, strict=True):
            scale = scales[f"model.layers.{i}.self_attn.{part}_scale"]
            assert scale.shape == (1,) and scale.dtype == torch.float32
            torch.testing.assert_close(scale[0], x.abs().max() / 448, rtol=1e-5, atol=0)


def test_transformers_loads_it_and_caches_float8(place: Path, checkpoint: Path) -> None:
    scales = load_file(checkpoint / SCALES)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(place / "micro", dtype=torch.float32)
    found = {n: t for n, t in model.state_dict().items() if n.endswith(("k_scale", "v_scale"))}
    assert found.keys() == scales.keys()
    assert all(torch.equal(t, scales[n]) for n, t in found.items())
    weights = plain.state_dict()
    assert all(torch.equal(model.state_dict()[n], t) for n, t in weights.items())
    ids = tokens(place)[:2]
    (k, v), (k8, v8) = cached(plain, ids)[0], cached(model, ids)[0]
    for part, exact, stored in (("k", k, k8), ("v", v, v8)):
        scale = scales[f"model.layers.0.self_attn.{part}_scale"]
        rounded = (exact / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        torch.testing.assert_close(stored, rounded, rtol=1e-6, atol=0)


def test_the_index_names_every_tensor(place: Path, checkpoint: Path) -> None:
    index = json.loads((checkpoint / INDEX).read_text())
    names = {f: set(load_file(checkpoint / f)) for f in (WEIGHTS, SCALES)}
    assert index["weight_map"] == {n: f for f, own in names.items() for n in own}
    assert {p.name for p in checkpoint.iterdir()} == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *(WEIGHTS, SCALES, INDEX),
    }


def test_a_second_export_takes_no_pass(
    place: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in checkpoint.iterdir()}
    monkeypatch.setattr(amax, "collect_amax", lambda *_: pytest.fail("a pass"))
    assert exported(place) == checkpoint
    assert {p.name: p.read_bytes() for p in checkpoint.iterdir()} == before
    linked = exported(place, "weights=link", f"checkpoints={place}/linked") / WEIGHTS
    assert linked.is_symlink() and linked.read_bytes() == before[WEIGHTS]


def test_other_text_is_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "calibration", tmp_path / "calibration")
    for folder in (tmp_path / "calibration" / "micro").iterdir():
        shutil.rmtree(folder / ".stages")
    (tmp_path / "text.txt").write_text((place / "text.txt").read_text().replace("apple", "plum"))
    given = [f"data.path={tmp_path}/text.txt", f"calibrations={tmp_path}/calibration"]
    with pytest.raises(ValueError, match="data: text must be that of .*calibrate again"):
        exported(place, *given)


def test_a_missing_calibration_is_named(place: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Run `python calibrate.py"):
        exported(place, f"calibrations={tmp_path}")


def test_shards_keep_their_names(
    place: Path, checkpoint: Path, tmp_path: Path, micro_llama: Callable[..., Any]
) -> None:
    micro_llama().save_pretrained(tmp_path / "m", max_shard_size="60KB")
    index = json.loads((tmp_path / "m" / INDEX).read_text())["weight_map"]
    assert len(set(index.values())) > 1
    Checkpoint(tmp_path / "m", tmp_path / "out", load_file(checkpoint / SCALES)).write()
    written = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert {n: f for n, f in written.items() if f != SCALES} == index
    index["lm_head.weight"] = "../../x.safetensors"
    (tmp_path / "m" / INDEX).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ValueError, match="shard must be a plain file name"):
        Checkpoint(tmp_path / "m", tmp_path / "out", {}).write()


def test_what_is_no_such_checkpoint_is_not_replaced(checkpoint: Path, tmp_path: Path) -> None:
    scales = load_file(checkpoint / SCALES)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "thesis.tex").write_text("x")
    micro = checkpoint.parent.parent / "micro"
    with pytest.raises(ValueError, match="new, empty, or such a checkpoint"):
        Checkpoint(micro, tmp_path / "here", scales).write()
    with pytest.raises(ValueError, match="quantization_config must be absent"):
        Checkpoint(checkpoint, tmp_path / "new", scales).write()
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


def test_layers_that_share_keys_share_scales(micro_llama: Callable[..., Any]) -> None:
    layer = LayerGeometry(2, 4, 16, 16)
    found = {"layers.0.k": torch.tensor([1.0, 448.0]), "layers.0.v": torch.zeros(2)}
    scales = scales_of(micro_llama(), ModelGeometry((layer, layer), (0, 0)), found)
    assert {n: float(t) for n, t in scales.items()} == {
        f"model.layers.{i}.self_attn.{part}_scale": 1.0 for i in range(2) for part in "kv"
    }


def test_families_that_engines_look_for_elsewhere_are_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=8))
    layer = LayerGeometry(2, 2, 4, 4)
    with pytest.raises(ValueError, match="named self_attn.*transformer.h.0.attn"):
        scales_of(model, ModelGeometry((layer,)), {})


def test_batches_do_not_matter_and_nan_is_named(micro_llama: Callable[..., Any]) -> None:
    model, ids = micro_llama(), torch.arange(3, 93).reshape(5, 18)
    once, often = collect_amax(model, ids, 5), collect_amax(model, ids, 2)
    assert once.keys() == often.keys() and len(once) == 2 * LAYERS
    for name, value in once.items():
        torch.testing.assert_close(often[name], value, rtol=1e-5, atol=0)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 1: values \(v\) must be finite"):
        collect_amax(model, ids, 5)
