"""Loading models: what is accepted, and one line for each way a folder can be broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvsmith.pipeline.config import repository_root
from kvsmith.pipeline.model import ModelConfig, load_model, load_tokenizer, model_device
from kvsmith.pipeline.training.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, micro_llama: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("models") / "micro"
    micro_llama().to(torch.bfloat16).save_pretrained(folder)
    train_tokenizer(["words"] * 9, 260, 64).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "micro"))


def _cfg(folder: Path, **options: Any) -> ModelConfig:
    return ModelConfig(path=str(folder), device="cpu", **options)


def test_auto_computes_in_float32_on_a_cpu(saved: Path) -> None:
    model, tokenizer = load_model(_cfg(saved))
    assert model.dtype == torch.float32 and not model.training
    assert tokenizer.eos_token == "<|endoftext|>"
    assert load_model(_cfg(saved, dtype="bfloat16"))[0].dtype == torch.bfloat16


def test_options_reach_transformers(saved: Path) -> None:
    model, _ = load_model(_cfg(saved, attn_implementation="eager"))
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="model.path: model must be loadable"):
        load_model(_cfg(saved, attn_implementation="nonsense"))


def test_relative_paths_start_here_or_at_the_repository(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved.parent)
    assert load_tokenizer(ModelConfig(path="micro")).eos_token_id == 0
    assert ModelConfig(path="a/b/llama").label == "llama"
    assert ModelConfig(path="a/b/llama", name="mine").label == "mine"


@pytest.mark.parametrize("path", ["nowhere", "a/b/c", "./nowhere", "../x"])
def test_a_missing_folder(path: str) -> None:
    with pytest.raises(FileNotFoundError, match="model.path: value must be an existing folder"):
        load_model(ModelConfig(path=path, device="cpu"))


def test_a_hub_name_without_a_network() -> None:
    with pytest.raises(ValueError, match="'nobody/nothing'") as error:
        load_model(ModelConfig(path="nobody/nothing", device="cpu"))
    assert "\n" not in str(error.value)


def test_a_truncated_shard_is_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: file must be whole safetensors"):
        load_model(_cfg(folder))
    weights.write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors: file must be whole safetensors"):
        load_model(_cfg(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_model(_cfg(folder))


def test_a_missing_shard_of_an_index_is_named(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors"):
        load_model(_cfg(folder))
    index.write_text("[]")
    with pytest.raises(ValueError, match="file must be an index of shards"):
        load_model(_cfg(folder))


def test_a_missing_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer must be present \(tokenizer\.json\)"):
        load_model(_cfg(folder))


def test_a_broken_configuration(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="model.path: model must be loadable") as error:
        load_model(_cfg(folder))
    assert "\n" not in str(error.value)


def test_remote_code_stays_off(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model.path: model must be loadable"):
        load_model(_cfg(folder))


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"model\.device: .* Use model\.device=cpu"):
        model_device(ModelConfig(path="x", device="cuda"))
    assert model_device(ModelConfig(path="x")).type == "cpu"


def test_the_shipped_model_is_what_its_record_says(tiny_model_dir: Path) -> None:
    assert tiny_model_dir == repository_root() / "artifacts" / "models" / "tiny"
    model, tokenizer = load_model(ModelConfig(path="artifacts/models/tiny", device="cpu"))
    record = json.loads((tiny_model_dir / "training.json").read_text())
    count = sum(weight.numel() for weight in model.parameters())
    assert count == record["parameters"] <= 5_000_000
    assert record["tokens_seen"] >= 25_000_000
    assert (tiny_model_dir / "model.safetensors").stat().st_size < 10_000_000
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.head_dim == 64 and model.config.max_position_embeddings == 1024
    sample = record["sample"]
    ids = tokenizer(sample["prompt"], return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(text) > 8 and sample["continuation"].startswith(text)
