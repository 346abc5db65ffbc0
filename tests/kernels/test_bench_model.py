"""The end-to-end benchmark on a tiny model and the CPU."""

import json

import torch
from transformers import LlamaConfig

from kvsmith.hf import make_cache
from kvsmith.kernels import bench_model
from kvsmith.sizes import cache_bytes

CPU = torch.device("cpu")
TINY = LlamaConfig(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=97,
    max_position_embeddings=4096,
)


def _model():
    return bench_model.random_model(TINY, CPU, torch.float32)


def test_rows_of_both_caches(monkeypatch):
    monkeypatch.setattr(bench_model, "CHUNK", 256)
    rows = bench_model.end_to_end(_model(), 600, 4)
    assert [r["cache"] for r in rows] == ["DynamicCache", "4 bits", "2 bits"]
    assert all(r["tokens_per_s"] > 0 and r["prefill_s"] > 0 for r in rows)
    for row in rows[1:]:
        assert row["held"] == row["planned"] and row["encode_share"] > 0
        assert row["speedup"] == row["tokens_per_s"] / rows[0]["tokens_per_s"]
    assert rows[2]["held"] < rows[1]["held"] and json.dumps(rows)


def test_what_does_not_fit_is_said(monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(bench_model, "generation", fails)
    rows = bench_model.end_to_end(_model(), 64, 1, (4,))
    assert [r["failed"] for r in rows] == ["out of memory"] * 2


def test_a_filled_device(monkeypatch):
    monkeypatch.setattr(bench_model, "CHUNK", 256)
    model, room = _model(), 400_000
    found = bench_model.fill(model, room)
    cache = make_cache(model, bench_model.spec_of(2, "post"))

    def size(tokens):
        return cache_bytes(cache.spec, cache.geometry, 1, tokens, torch.float32, 0).total

    assert size(found["tokens"]) <= room < size(found["tokens"] + 256)
    assert found["finite"] and found["held"] <= 1.01 * room and found["step_s"] > 0


def test_the_shape_of_llama_3_8b():
    c = bench_model.LLAMA_3_8B
    assert c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 2 * 2 == 131072
