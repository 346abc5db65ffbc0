"""Loading models: what is accepted, and one line for each way a folder can be broken."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import (
    AutoConfig,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MptConfig,
    dynamic_module_utils,
)

from kvsmith.hf import make_cache
from kvsmith.pipeline import model as model_module
from kvsmith.pipeline import model_source
from kvsmith.pipeline.codecs import load_codec
from kvsmith.pipeline.config import repository_root
from kvsmith.pipeline.model import (
    ModelConfig,
    input_device,
    load_config,
    load_model,
    load_tokenizer,
    model_context,
    model_device,
)
from kvsmith.pipeline.training.tokenizer import train_tokenizer
from kvsmith.spec import CacheSpec
from tests.micro_model import write_model


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
    with pytest.raises(ValueError, match="'nobody/nothing'.*hf download nobody/nothing") as error:
        load_model(ModelConfig(path="nobody/nothing", device="cpu"))
    assert "\n" not in str(error.value) and "HF_TOKEN" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        (GatedRepoError, r"Accept its terms at https://huggingface\.co/a/b, then set HF_TOKEN"),
        (RepositoryNotFoundError, "Check the name; a private model needs HF_TOKEN"),
        (RevisionNotFoundError, "Check model.revision=v9"),
        (ConnectionError, "hf download a/b --revision v9"),
    ],
)
def test_what_the_hub_refuses_says_what_to_do(
    kind: Any, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        # The hub's errors hold a response that is not needed here.
        cause = kind.__new__(kind)
        raise OSError("You cannot have it.\nMore lines.") from cause

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ValueError, match=remedy) as error:
        load_model(ModelConfig(path="a/b", device="cpu", revision="v9"))
    assert "\n" not in str(error.value) and "got 'a/b': You cannot have it. " in str(error.value)


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
    with pytest.raises(ValueError, match="model.path: configuration must be loadable") as error:
        load_model(_cfg(folder))
    assert "\n" not in str(error.value)


def test_remote_code_stays_off(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"loadable.*set model\.trust_remote_code=true"):
        load_model(_cfg(folder))


def test_code_that_is_trusted_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder.parent / "modules"))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig\nclass C(LlamaConfig):\n    model_type = 'own'\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert load_config(_cfg(folder, trust_remote_code=True)).model_type == "own"


def test_a_map_of_devices_gives_the_same_logits(saved: Path) -> None:
    ids = torch.arange(20)[None]
    plain = load_model(_cfg(saved))[0]
    spread = load_model(ModelConfig(path=str(saved), device_map="auto", dtype="float32"))[0]
    assert input_device(spread) == input_device(plain) or torch.cuda.is_available()
    with torch.no_grad():
        found = spread(ids.to(input_device(spread))).logits.cpu()
        torch.testing.assert_close(found, plain(ids).logits)
    with pytest.raises(ValueError, match=r"device: value must be auto with model\.device_map"):
        _cfg(saved, device_map="auto")


def _without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def find(name: str) -> object:
        return None if name in names else importlib.util.find_spec(name)

    monkeypatch.setattr(model_source, "find_spec", find)


def test_a_package_that_is_missing_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without(monkeypatch, "bitsandbytes", "accelerate", "gptqmodel")
    with pytest.raises(ValueError, match=r"pip install bitsandbytes accelerate`, or set model\.we"):
        load_model(_cfg(folder, weight_bits=4))
    with pytest.raises(ValueError, match=r"model\.device_map: .*pip install accelerate"):
        load_model(ModelConfig(path=str(folder), device_map="balanced"))
    monkeypatch.setattr(model_module, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ValueError, match=r"flash-attn`, or set model\.attn_implementation=sdpa"):
        load_model(_cfg(folder, attn_implementation="flash_attention_2"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"gptqmodel.* installed for its gptq weights"):
        load_model(_cfg(folder))
    with pytest.raises(ValueError, match=r"weight_bits: .* null for weights that are gptq already"):
        load_model(_cfg(folder, weight_bits=8))


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_in_few_bits(bits: Any, tiny_model_dir: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plain = load_model(_cfg(tiny_model_dir))[0]
    model = load_model(_cfg(tiny_model_dir, weight_bits=bits))[0]
    assert model.get_memory_footprint() < plain.get_memory_footprint() * (0.6 if bits == 8 else 0.5)
    ids = torch.arange(60, 124)[None]
    with torch.no_grad():
        logp = [m(ids).logits[0].log_softmax(-1) for m in (model, plain)]
        gap = F.kl_div(*logp, log_target=True, reduction="batchmean")
    assert 0 < gap < 0.1


def test_gear_over_weights_of_8_bits(tiny_model_dir: Path) -> None:
    """Diverges from the same weights' own full precision as little as over weights of 32 bits."""
    pytest.importorskip("bitsandbytes")
    gaps = []
    for bits in (None, 8):
        model, tokenizer = load_model(_cfg(tiny_model_dir, weight_bits=bits))
        text = (repository_root() / "README.md").read_text()[:1000]
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :192]
        cache = make_cache(model, CacheSpec(load_codec("gear_q4")))
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 72, "min_new_tokens": 72}
        made = model.generate(
            ids, past_key_values=cache, output_logits=True, return_dict_in_generate=True, **options
        )
        with torch.no_grad():
            want = model(made.sequences[:, :-1]).logits[0, 191:].log_softmax(-1)
        got = torch.cat(made.logits).log_softmax(-1)
        gaps.append(F.kl_div(got, want, log_target=True, reduction="batchmean").item())
    assert len(got) == 72 and 0 < gaps[1] < 3 * gaps[0] < 0.03


def test_nothing_but_results_is_said(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(_cfg(saved))
    assert capfd.readouterr() == ("", "")


def test_the_context_of_a_model() -> None:
    assert model_context(LlamaConfig(max_position_embeddings=77)) == 77
    assert model_context(MptConfig(max_seq_len=78)) == 78
    assert model_context(GPT2Config(n_positions=79)) == 79
    assert model_context(BloomConfig()) > 2**40


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


def test_exchanged_shards_are_no_model(tmp_path: Path, micro_llama: Callable[..., Any]) -> None:
    folder = write_model(tmp_path / "micro", micro_llama, layers=4)
    micro_llama(vocab=257, layers=4).save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    load_model(ModelConfig(str(folder), device="cpu"))  # the index is not needed to find a tensor
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"weights must be complete, got nothing for \d+ of them"):
        load_model(ModelConfig(str(folder), device="cpu"))
