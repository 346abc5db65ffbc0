"""The context manager and the pipeline generate what the bundle's cache generates by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import kvsmith
from kvsmith.bundle import Bundle, base_model
from kvsmith.hf import KVCache, geometry
from kvsmith.hf.compress import TASK
from kvsmith.spec import NUQ, CacheSpec, CodecSpec, TensorCodec, Uniform
from tests.micro_model import write_model

SPEC = CacheSpec(CodecSpec(TensorCodec(Uniform(bits=3)), TensorCodec(NUQ(bits=2, table="nf"))))
OPTIONS: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def model(micro_llama: Callable[..., Any]) -> Any:
    return micro_llama()


@pytest.fixture
def bundle(model: Any) -> Bundle:
    base = base_model(model.config.to_dict(), geometry(model.config), "micro")
    return Bundle.create(SPEC, {}, base)


def test_generate_inside_a_block_is_compressed(model: Any, bundle: Bundle, tmp_path: Path) -> None:
    ids = torch.randint(3, 97, (2, 60))
    plain = model.generate(ids, **OPTIONS)
    by_hand = model.generate(ids, past_key_values=bundle.cache(model), **OPTIONS)
    assert not torch.equal(plain, by_hand)
    folder = bundle.save_pretrained(tmp_path / "b")
    for given in (bundle, folder, str(folder), SPEC):
        with kvsmith.compress(model, given) as used:
            assert used.cache is None
            assert torch.equal(model.generate(ids, **OPTIONS), by_hand)
            assert isinstance(used.cache, KVCache) and used.cache.get_seq_length() == 99
            first = used.cache
            model.generate(ids, **OPTIONS)
            assert used.cache is not first  # no call sees another's tokens
        assert torch.equal(model.generate(ids, **OPTIONS), plain)


def test_forward_passes_and_caches_of_the_caller(model: Any, bundle: Bundle) -> None:
    ids = torch.randint(3, 97, (1, 60))
    with kvsmith.compress(model, bundle) as used:
        assert isinstance(model(ids, use_cache=True).past_key_values, KVCache)
        assert used.cache is not None
        used.cache = None
        assert model(ids, use_cache=False).past_key_values is None
        own = transformers.DynamicCache(config=model.config)
        model.generate(ids, past_key_values=own, **OPTIONS)
        assert used.cache is None and own.get_seq_length() == 99


def test_the_model_is_as_it_was_after_an_error(model: Any, bundle: Bundle) -> None:
    hooks = len(model._forward_pre_hooks)
    with pytest.raises(RuntimeError, match="mine"), kvsmith.compress(model, bundle):
        with pytest.raises(ValueError, match="compress: model must be outside of another compress"):
            kvsmith.compress(model, bundle).__enter__()
        raise RuntimeError("mine")
    assert "generate" not in vars(model) and len(model._forward_pre_hooks) == hooks


def test_another_model_is_refused_at_once(bundle: Bundle, micro_llama: Callable[..., Any]) -> None:
    with pytest.raises(kvsmith.BundleError, match="base model's"):
        kvsmith.compress(micro_llama(layers=3), bundle)


def test_the_pipeline_generates_with_the_bundle(
    tmp_path: Path, micro_llama: Callable[..., Any]
) -> None:
    folder = write_model(tmp_path / "m", micro_llama)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    base = base_model(model.config.to_dict(), geometry(model.config), "micro")
    bundle = Bundle.create(SPEC, {}, base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    parts = {"model": model, "tokenizer": tokenizer}
    text = "bread copper delta ember flint grove harbor island jungle apple"
    options = {"max_new_tokens": 30, "do_sample": False, "return_full_text": False}
    said = transformers.pipeline(TASK, bundle=bundle, **parts)(text, **options)
    with kvsmith.compress(model, bundle):
        same = transformers.pipeline("text-generation", **parts)(text, **options)
    assert said == same and said[0]["generated_text"]
