"""Presets are codecs by another name, and `compress` takes those that need no calibration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import kvsmith
from kvsmith.hf import KVCache
from kvsmith.pipeline.codecs import codec_name, codec_names, load_codec, preset_names
from kvsmith.pipeline.config import load
from kvsmith.pipeline.export import ExportConfig

NAMES = ["balanced-3", "fast-2", "fast-4", "quality-4", "tiny-2", "zero-4"]


def test_there_are_six_and_they_are_codecs() -> None:
    assert preset_names() == NAMES
    for name in NAMES:
        codec = load_codec(name)
        assert codec_name(codec) in codec_names()  # folders carry the codec's own name
        assert load(ExportConfig, "export", [f"codec={name}"]).codec == codec
        assert codec.k.quantizer.kind != "identity" and codec.k.quantizer.bits == int(name[-1])
    changed = load(ExportConfig, "export", ["codec=tiny-2", "codec.recent=32"]).codec
    assert changed.recent == 32 and changed.k == load_codec("tiny-2").k


def test_compress_takes_a_preset_that_needs_no_calibration(
    micro_llama: Callable[..., Any],
) -> None:
    model, ids = micro_llama(head_dim=32), torch.randint(3, 97, (1, 90))
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    by_hand = kvsmith.make_cache(model, kvsmith.CacheSpec(load_codec("zero-4")))
    expected = model.generate(ids, past_key_values=by_hand, **options)
    with kvsmith.compress(model, "zero-4") as used:
        assert torch.equal(model.generate(ids, **options), expected)
    assert isinstance(used.cache, KVCache) and used.cache.nbytes() == by_hand.nbytes()
    assert used.cache.spec.codec == load_codec("zero-4")
    with pytest.raises(ValueError, match="needs no calibration, got quality-4. Run calibrate.py"):
        kvsmith.compress(model, "quality-4")
    with pytest.raises(ValueError, match="Did you mean zero-4"):
        kvsmith.compress(model, "zero4")
