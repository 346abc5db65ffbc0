"""A bundle with a delta: from the base's weights to the trained model's bits, or one line."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvsmith
from kvsmith.__main__ import main
from kvsmith.bundle import Bundle, Delta, base_model
from kvsmith.bundle.manifest import CARD, MANIFEST
from kvsmith.bundle.shards import encode
from kvsmith.hf import geometry, share
from kvsmith.hf.weights import weights_hash, weights_in_memory
from kvsmith.spec import CacheSpec, CodecSpec, Identity, TensorCodec
from tests.golden import contents, golden_bundle, refusal, reseal

SPEC = CacheSpec(CodecSpec(TensorCodec(Identity()), TensorCodec(Identity())))
OWNER, SHARD = (0, 0, 2, 2), "delta.safetensors"
QUERY, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
BF16 = torch.bfloat16


def base_of(micro_llama: Callable[..., Any], **shape: Any) -> Any:
    return micro_llama(layers=4, **shape)


def trained_from(base: Any) -> Any:
    """Two weights changed, all rounded to bfloat16 as train.py writes them; its layers share."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.get_parameter(QUERY).mul_(1.5)
        model.get_parameter(NORM)[3] = -2.0
    share(model.to(BF16), OWNER)
    return model


def bundle_of(base: Any, model: Any, weights: dict[str, Any] | None = None) -> Bundle:
    config = model.config.get_text_config(decoder=True)
    identity = base_model(config.to_dict(), geometry(model.config), "micro-cla2")
    delta = Delta("micro", None, weights_hash(weights_in_memory(base, "").items()), "bfloat16")
    changed = {name: model.get_parameter(name) for name in (QUERY, NORM)}
    changed = changed if weights is None else weights
    return Bundle.create(SPEC, {}, identity, delta=delta, weights=changed)


@pytest.fixture
def place(tmp_path: Path, micro_llama: Callable[..., Any]) -> Path:
    base = base_of(micro_llama)
    return bundle_of(base, trained_from(base)).save_pretrained(tmp_path / "bundle")


def state(model: Any) -> dict[str, Any]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def same(model: Any, before: dict[str, Any]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[n], w) for n, w in before.items())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_base_becomes_the_trained_model_bit_for_bit(
    place: Path, micro_llama: Callable[..., Any], dtype: torch.dtype
) -> None:
    model, want = base_of(micro_llama).to(dtype), trained_from(base_of(micro_llama)).to(dtype)
    bundle = kvsmith.load(place)
    assert bundle.weights.keys() == {QUERY, NORM}
    assert "Call bundle.apply(model) first (scripts" in refusal(lambda: bundle.cache(model))
    bundle.apply(model)
    assert same(model, want.state_dict()) and model.config.kv_owner == list(OWNER)
    ids = torch.arange(3, 23)[None]
    cache = bundle.cache(model)
    got = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    whole = want.generate(
        ids, past_key_values=bundle.cache(want), max_new_tokens=8, do_sample=False
    )
    assert torch.equal(got, whole) and sorted(cache.stores) == [0, 2]
    assert "Load it again" in refusal(lambda: bundle.apply(model))
    assert same(model, want.state_dict())


def test_it_is_small_and_written_to_the_same_bytes(
    place: Path, tmp_path: Path, micro_llama: Callable[..., Any]
) -> None:
    whole = contents(place)
    assert whole.keys() == {MANIFEST, SHARD, CARD}
    assert len(whole[SHARD]) < 2 * (64 * 64 + 64) + 512  # two weights of bfloat16, and a header
    again = kvsmith.load(place).save_pretrained(tmp_path / "again")
    assert contents(again) == whole
    base = base_of(micro_llama)
    fresh = bundle_of(base, trained_from(base)).save_pretrained(tmp_path / "fresh")
    assert contents(fresh) == whole
    assert "bundle.apply(model)" in whole[CARD].decode()


def test_weights_may_lie_in_several_shards(
    place: Path, micro_llama: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = kvsmith.load(place).weights
    parts = {f"part-{i}.safetensors": encode({n: w}) for i, (n, w) in enumerate(weights.items())}

    def listed(data: Any) -> None:
        for name, raw in parts.items():
            (place / name).write_bytes(raw)
            info = {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw)}
            data["files"][name] = info
        data["delta"]["files"] = [*data["delta"]["files"], *parts]

    reseal(place, listed)
    assert "in one shard" in refusal(lambda: kvsmith.load(place))  # each of them twice
    reseal(place, lambda data: data["delta"].update(files=sorted(parts)))
    assert "one that the codec owns" in refusal(lambda: kvsmith.load(place))
    reseal(place, lambda data: data["files"].pop(SHARD))
    assert kvsmith.load(place).weights.keys() == weights.keys()
    assert main(["inspect", str(place)]) == 0
    assert "beside those of micro" in capsys.readouterr().out
    base_of(micro_llama).config.save_pretrained(place.parent / "base")
    assert main(["verify", str(place), "--model", str(place.parent / "base")]) == 0


def test_another_base_is_one_line_and_nothing_changes(
    place: Path, micro_llama: Callable[..., Any]
) -> None:
    bundle = kvsmith.load(place)
    others = [(base_of(micro_llama, seed=1), "base model's weights must be")]
    others.append((micro_llama(layers=3), "layer count must be 4, got 3"))
    others.append((base_of(micro_llama, kv_heads=1), "kv_heads (layer 0)"))
    apart = base_of(micro_llama)
    with torch.no_grad():
        apart.lm_head.weight.mul_(1.02)
    others.append((apart, "(micro)"))
    for model, words in others:
        before = state(model)
        message = refusal(lambda m=model: bundle.apply(m))
        assert words in message and "made for micro; load that model" in message
        assert same(model, before) and getattr(model.config, "kv_owner", None) is None
    assert "call cache(model)" in refusal(lambda: golden_bundle().apply(apart))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"model.nothing": torch.zeros(2, dtype=BF16)}, "one of the model's weights"),
        ({NORM: torch.zeros(65, dtype=BF16)}, "must be [64], got [65]"),
        ({NORM: torch.zeros(64, 1, dtype=BF16)}, "must be [64], got [64, 1]"),
    ],
)
def test_weights_of_no_such_model_change_nothing(
    weights: dict[str, Any], words: str, micro_llama: Callable[..., Any]
) -> None:
    model = base_of(micro_llama)
    good = {QUERY: torch.zeros(64, 64, dtype=BF16)}
    bundle = bundle_of(model, trained_from(model), good | weights)
    before = state(model)
    assert words in refusal(lambda: bundle.apply(model))
    assert same(model, before) and getattr(model.config, "kv_owner", None) is None
    with pytest.raises(ValueError, match="in memory, got elsewhere"):
        bundle.apply(copy.deepcopy(model).to("meta"))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({NORM: torch.zeros(64)}, "dtype must be BF16, got F32"),
        ({NORM: torch.full((64,), float("nan"), dtype=BF16)}, "finite"),
        ({NORM: torch.ones([1] * 9, dtype=BF16)}, "at most 8 positive integers"),
        ({NORM: torch.zeros(0, dtype=BF16)}, "at most 8 positive integers"),
    ],
)
def test_hostile_shards(place: Path, weights: dict[str, Any], words: str) -> None:
    (place / SHARD).write_bytes(encode(weights))
    assert "size must be" in refusal(lambda: kvsmith.load(place))
    reseal(place)
    assert words in refusal(lambda: kvsmith.load(place))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("files", ["elsewhere.safetensors"], "that of a shard in files"),
        ("files", ["README.md"], "that of a shard in files"),
        ("files", [SHARD, SHARD], "names must be different"),
        ("files", [], "one that the codec owns"),
        ("weights_hash", "abc", "64 hexadecimal digits"),
        ("dtype", "int8", "one of float16, bfloat16, float32"),
        ("dtype", "float32", "dtype must be F32, got BF16"),
        ("id", "", "non-empty"),
        ("more", 1, "key must be one of"),
    ],
)
def test_hostile_manifests(place: Path, key: str, value: Any, words: str) -> None:
    reseal(place, lambda data: data["delta"].update({key: value}))
    assert words in refusal(lambda: kvsmith.load(place))


def test_weights_need_a_delta(place: Path) -> None:
    bundle = kvsmith.load(place)
    assert "none without a delta" in refusal(
        lambda: Bundle.create(SPEC, {}, bundle.manifest.base_model, weights=bundle.weights)
    )
    delta = bundle.manifest.delta
    assert delta is not None
    wide = {name: weight.float() for name, weight in bundle.weights.items()}
    assert "dtype must be bfloat16" in refusal(
        lambda: Bundle.create(SPEC, {}, bundle.manifest.base_model, delta=delta, weights=wide)
    )


def test_the_hash_is_that_of_the_format(micro_llama: Callable[..., Any]) -> None:
    """In numpy from docs/FORMAT.md; numpy has no bfloat16, so the weights are such already."""
    model = base_of(micro_llama).to(BF16).float()
    with torch.no_grad():
        model.get_parameter(NORM)[:2] = torch.tensor([2.0**-15, -(2.0**-14)])
    state = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        values = weight.detach().numpy().reshape(-1)
        some = values[:: max(1, values.size // 1024)]
        some = np.where(np.abs(some) < 2.0**-14, 0.0, some).astype("<f4")
        state.update(f"{name} {list(weight.shape)}\n".encode() + some.tobytes())
    assert weights_hash(weights_in_memory(model, "").items()) == state.hexdigest()
