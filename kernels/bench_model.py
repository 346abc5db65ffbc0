"""End to end on a model of random weights: tokens a second, peak memory, and a device filled.

An entry point beside the runtime: unlike the ops it imports kvsmith and transformers.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvsmith.hf import make_cache
from kvsmith.hf.cache import KVCache
from kvsmith.sizes import cache_bytes
from kvsmith.spec import NUQ, CacheSpec, CodecSpec, TensorCodec, TopK

LLAMA_3_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=1 << 23,
    rope_theta=500000.0,
)
CHUNK = 4096  # tokens of one step of a long prompt


def spec_of(bits: int, domain: str = "pre") -> CacheSpec:
    """A cache that needs no calibration: normal-float levels, 1 % outliers, keys and values."""
    part = TensorCodec(NUQ(bits=bits, table="nf"), TopK(0.01))
    return CacheSpec(CodecSpec(part, part, key_domain="post" if domain == "post" else "pre"))


def random_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of random weights, made on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


@torch.inference_mode()
def generation(model: Any, cache: Any, tokens: int, steps: int) -> dict[str, Any]:
    """Read a prompt in chunks and decode greedily.

    Args:
        model: a causal language model.
        cache: an empty cache.
        tokens: of the prompt.
        steps: tokens to decode, the first not counted.

    Returns:
        `prefill_s`, `tokens_per_s` and `memory`, the peak of allocated bytes beyond the first.
    """
    device = model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    base = _peak(device)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=device)
    start = _now(device)
    for part in ids.split(CHUNK, dim=1):
        logits = model(part, past_key_values=cache, logits_to_keep=1).logits
    prefill = _now(device) - start
    for step in range(steps + 1):
        if step == 1:
            start = _now(device)
        logits = model(logits[:, -1:].argmax(-1), past_key_values=cache, logits_to_keep=1).logits
    taken = _now(device) - start
    return {
        "prefill_s": prefill,
        "tokens_per_s": steps / taken,
        "memory": _peak(device) - base,
    }


def _encode_seconds(cache: KVCache, tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    """Time to store a prompt's keys and values in all layers of an empty cache."""
    total = 0.0
    for layer, store in cache.stores.items():
        shape = cache.geometry.layers[layer]
        k = torch.randn(1, shape.kv_heads, CHUNK, shape.k_dim, device=device, dtype=dtype)
        start = _now(device)
        for first in range(0, tokens, CHUNK):
            part = k[:, :, : min(CHUNK, tokens - first)]
            store.append(part, part)
        total += _now(device) - start
    return total


def end_to_end(
    model: Any, tokens: int, steps: int, bits: tuple[int, ...] = (4, 2)
) -> list[dict[str, Any]]:
    """DynamicCache with torch's attention, then ours, on the same model.

    Returns:
        One dict a cache: `generation`'s, and for ours `planned` bytes of the cache, `held` bytes,
        `speedup` over DynamicCache and `encode_share` of the prefill's time.
    """
    device, dtype = model.device, model.dtype
    rows = [{"cache": "DynamicCache", **_tried(model, DynamicCache(), tokens, steps)}]
    for width in bits:
        cache = make_cache(model, spec_of(width))
        row = {"cache": f"{width} bits", **_tried(model, cache, tokens, steps)}
        if "tokens_per_s" in row:
            total = tokens + steps + 1
            row["held"] = cache.nbytes()
            row["planned"] = cache_bytes(cache.spec, cache.geometry, 1, total, dtype).total
            cache.reset()
            row["encode_share"] = _encode_seconds(cache, tokens, device, dtype) / row["prefill_s"]
            if "tokens_per_s" in rows[0]:
                row["speedup"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        rows.append(row)
    return rows


def _tried(model: Any, cache: Any, tokens: int, steps: int) -> dict[str, Any]:
    try:
        return generation(model, cache, tokens, steps)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}


def tokens_that_fit(cache: KVCache, room: int, dtype: torch.dtype) -> int:
    """Tokens of one row whose cache takes at most `room` bytes, whole chunks."""

    def total(tokens: int) -> int:
        return cache_bytes(cache.spec, cache.geometry, 1, tokens, dtype, 0).total

    chunks, step = 0, 1 << 24
    while step:
        if total((chunks + step) * CHUNK) <= room:
            chunks += step
        else:
            step //= 2
    return chunks * CHUNK


@torch.inference_mode()
def fill(model: Any, room: int, bits: int = 2) -> dict[str, Any]:
    """Store as many tokens as fit, decode one, and record the peak.

    Keys are stored after RoPE and random: what counts is their size.

    Args:
        model: a causal language model.
        room: bytes that the cache may take.
        bits: code width.

    Returns:
        `tokens`, `held` bytes of the cache, `memory` (peak of all allocated bytes), `step_s`.
    """
    device, dtype = model.device, model.dtype
    cache = make_cache(model, spec_of(bits, "post"))
    tokens = tokens_that_fit(cache, room, dtype)
    for layer, store in cache.stores.items():
        shape = cache.geometry.layers[layer]
        k = torch.randn(1, shape.kv_heads, CHUNK, shape.k_dim, device=device, dtype=dtype)
        for _ in range(tokens // CHUNK):
            store.append(k, k)
    ids = torch.zeros((1, 1), dtype=torch.long, device=device)
    start = _now(device)
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    taken = _now(device) - start
    finite = bool(logits.isfinite().all())
    found = {"tokens": tokens, "held": cache.nbytes(), "memory": _peak(device)}
    return found | {"step_s": taken, "finite": finite}
