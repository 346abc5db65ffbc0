"""Throughput and peak memory of `model.generate`, and where its time goes."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from cProfile import Profile
from dataclasses import dataclass
from functools import partial
from pstats import Stats
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import QuantizedCache
from transformers.utils import is_optimum_quanto_available

from kvsmith.hf import make_cache
from kvsmith.pipeline.codecs import load_codec
from kvsmith.pipeline.gear.error import ways
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.progress import reset_peak, resident
from kvsmith.spec import CacheSpec, CodecSpec

CODECS = ("gear2", "gear_l2", "gear_q2", "kivi2_g64")
ATTENDING = ("read_factors", "add_low_rank", "low_rank_logits", "low_rank_values")
# Files whose own time is counted together, and the torch calls that they make.
PLACES = {
    "encode: integers and outliers": ("kernels/encode_pack/", "kernels/pack/"),
    "decode: integers and outliers": ("kernels/decode/",),
    "factors: found": ("kernels/low_rank/",),
    "factors: attended to": (),
    "attend: in place": ("kernels/attend_encoded/", "kvsmith/fused.py"),
    "attend: dense part": ("kernels/attend/", "kernels/partial.py", "kvsmith/attention.py"),
    "pages": ("kvsmith/pages.py", "kvsmith/codec.py", "kvsmith/store.py", "kvsmith/stores.py"),
}


@dataclass(frozen=True)
class Generated:
    """One call of `generate`.

    Attributes:
        prefill: CPU seconds to the first token.
        rate: tokens of all rows a CPU second after that.
        nbytes: bytes of the cache at the end.
        peak: most resident bytes above those before the call.
    """

    prefill: float
    rate: float
    nbytes: int
    peak: int


def random_model() -> LlamaForCausalLM:
    """A Llama of 2 layers, 8 query and 8 KV heads of 64, bfloat16."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        vocab_size=512,
        max_position_embeddings=16384,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def generate(log: Run, new_tokens: int = 64) -> None:
    """Ours beside transformers' own caches, by batch and length."""
    model = random_model()
    makers: dict[str, Callable[[], Cache]] = {
        "DynamicCache": lambda: DynamicCache(config=model.config)
    }
    if is_optimum_quanto_available():
        makers["QuantizedCache 2"] = lambda: QuantizedCache("quanto", model.config, nbits=2)
    for name in CODECS:
        makers[name] = partial(make_cache, model, CacheSpec(load_codec(name)))
    columns = ("cache", "prefill s", "tokens/s", "cache MB", "peak MB")
    for batch, length in ((1, 1024), (8, 1024), (1, 4096)):
        ids, rows = torch.randint(3, 512, (batch, length)), []
        for name, make in makers.items():
            got = _apart(partial(_generated, model, make, ids, new_tokens))
            sizes = [f"{n / 1e6:.1f}" for n in (got.nbytes, got.peak)]
            rows.append([name, f"{got.prefill:.2f}", f"{got.rate:.1f}", *sizes])
        title = f"{batch} x {length} tokens, {new_tokens} new; CPU seconds; peak above the model"
        log.table(title, columns, rows)


def _apart(work: Callable[[], Generated]) -> Generated:
    """Run in a process of its own, so that no memory is left from another candidate."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=lambda: send.send(work()))
    process.start()
    send.close()
    try:
        found: Generated = receive.recv()
    finally:
        process.join()
    return found


def _generated(
    model: PreTrainedModel, make: Callable[[], Cache], ids: Tensor, new_tokens: int
) -> Generated:
    stamps: list[float] = []
    hook = model.register_forward_hook(lambda *_: stamps.append(time.process_time()))
    before, begin, cache = resident(), time.process_time(), make()
    reset_peak()
    _run(model, cache, ids, new_tokens)
    peak = resident(peak=True) - before
    hook.remove()
    rate = new_tokens * ids.shape[0] / (stamps[-1] - stamps[0])
    return Generated(stamps[0] - begin, rate, _nbytes(cache), peak)


def _run(model: PreTrainedModel, cache: Cache, ids: Tensor, new_tokens: int) -> None:
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=new_tokens + 1,
        min_new_tokens=new_tokens + 1,
        pad_token_id=0,
    )


def _nbytes(held: Any) -> int:
    """Bytes of a cache, or of a tensor that may be made of others."""
    if hasattr(held, "nbytes") and callable(held.nbytes):
        size: int = held.nbytes()
        return size
    if isinstance(held, Cache):
        names = ("keys", "values", "_quantized_keys", "_quantized_values")
        parts = [getattr(layer, n, None) for layer in held.layers for n in names]
        return sum(_nbytes(t) for t in parts if t is not None)
    if hasattr(held, "__tensor_flatten__"):
        return sum(_nbytes(getattr(held, n)) for n in held.__tensor_flatten__()[0])
    assert isinstance(held, Tensor)
    return held.nbytes


def breakdown(log: Run, batch: int = 1, length: int = 2048, new_tokens: int = 128) -> None:
    """CPU seconds of a codec with its parts off and on, by what they are spent on."""
    model = random_model()
    ids = torch.randint(3, 512, (batch, length))
    tried = ways(load_codec("gear2"))
    found = {name: _profiled(model, spec, ids, new_tokens) for name, spec in tried.items()}
    places = next(iter(found.values()))
    rows = [[place, *(f"{times[place]:.2f}" for times in found.values())] for place in places]
    title = f"gear2, CPU seconds of {batch} x {length} tokens and {new_tokens} new ones"
    log.table(title, ("", *found), rows)


def _profiled(
    model: PreTrainedModel, spec: CodecSpec, ids: Tensor, new_tokens: int
) -> dict[str, float]:
    cache, profile = make_cache(model, CacheSpec(spec)), Profile(time.process_time, builtins=False)
    profile.runcall(_run, model, cache, ids, new_tokens)
    stats: Any = Stats(profile)
    taken = dict.fromkeys([*PLACES, "the model and the rest"], 0.0)
    for (file, _, function), (_, _, own, _, callers) in stats.stats.items():
        taken[_place(file, function)] += own
        if file.endswith("kernels/decode/api.py"):
            # What is decoded to be encoded is the error that the factors are found from.
            error = sum(c[3] for (path, _, f), c in callers.items() if f == "encode")
            taken["decode: integers and outliers"] -= error
            taken["factors: found"] += error
    return taken | {"all": stats.total_tt}


def _place(file: str, function: str) -> str:
    if function in ATTENDING:
        return "factors: attended to"
    found = (p for p, parts in PLACES.items() if any(part in file for part in parts))
    return next(found, "the model and the rest")
