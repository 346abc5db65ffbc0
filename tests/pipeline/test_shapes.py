"""Any head dim and KV width: also where 1 % is less than one element, or heads are odd or wide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvsmith.hf import geometry, make_cache
from kvsmith.hf.cache import KVCache
from kvsmith.layout import outlier_slots
from kvsmith.pipeline.calibrate import CalibrateConfig, calibrate
from kvsmith.pipeline.calibration import parameters_for
from kvsmith.pipeline.codecs import load_codec
from kvsmith.pipeline.data import PydocsData
from kvsmith.pipeline.evaluation.footprint import footprint
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.model import ModelConfig
from kvsmith.pipeline.stage import Stop
from kvsmith.sizes import cache_bytes
from kvsmith.spec import CacheSpec

# KV heads and head dim; outlier slots of a token at 1 %.
SHAPES = [(4, 8, 0), (1, 32, 0), (3, 80, 2), (1, 256, 3)]


def held(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that an object holds, however deep, without the model's modules."""
    if id(value) in seen or isinstance(value, nn.Module | type | str | int | float):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    children = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list | tuple):
        children = list(getattr(value, "__dict__", {}).values())
        children += [getattr(value, name, None) for name in getattr(value, "__slots__", ())]
    for child in children:
        yield from held(child, seen)


def allocated(value: Any) -> int:
    """Bytes of every storage that an object holds."""
    storages = [t.untyped_storage() for t in held(value, set())]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def kernel_notes(cache: KVCache) -> int:
    """Bytes of what kernels are told beside the tokens: addresses of pages, revolutions of RoPE,
    pairs of channels, which all caches of a process share.
    """
    stores = cache.stores.values()
    tables = [(getattr(store, "_table", None), store.pairing) for store in stores]
    return allocated([tables, cache.positions.turns, list(cache.positions.regular)])


@pytest.mark.parametrize(("kv_heads", "head_dim", "slots"), SHAPES)
def test_calibrates_and_caches_and_counts_what_is_allocated(
    kv_heads: int, head_dim: int, slots: int, tmp_path: Path, micro_llama: Callable[..., Any]
) -> None:
    model = micro_llama(kv_heads=kv_heads, heads=2 * kv_heads, head_dim=head_dim)
    codecs = {name: load_codec(name) for name in ("nuq4_o1", "nuq3_o1")}
    cfg = CalibrateConfig(
        ModelConfig("micro"), PydocsData(), samples=4, length=60, batch_size=2, folder=str(tmp_path)
    )
    with Run(None) as log, Stop() as stop:
        folder = calibrate(cfg, codecs, model, torch.randint(3, 97, (4, 60)), log, stop)
    shape, ids = geometry(model.config), torch.randint(3, 97, (1, 300))
    with torch.no_grad():
        want = model(ids).logits[:, 200:]
    errors = []
    for codec in codecs.values():
        assert outlier_slots(codec.k, kv_heads, head_dim, codec.block_size) == slots
        spec, parameters = CacheSpec(codec), parameters_for(folder, codec)
        cache = make_cache(model, spec, parameters)
        size = footprint(model, cache, ids, shape.elements, 2, 3)
        notes = kernel_notes(cache)
        assert notes <= 1024 * len(cache.stores) + 2048 + 16 * head_dim
        assert size.nbytes == cache.nbytes() == allocated(cache) - notes
        assert size.nbytes == cache_bytes(spec, shape, 1, 300, torch.float32).total
        assert size.bits_per_element == 8 * cache.nbytes() / (300 * 4 * kv_heads * head_dim)
        with torch.no_grad():
            cache = make_cache(model, spec, parameters)
            model(ids[:, :200], past_key_values=cache)
            got = model(ids[:, 200:], past_key_values=cache).logits
        errors.append(((got - want).abs().mean() / want.std()).item())
    # Logits that have nothing to do with each other differ by 2 / sqrt(pi) = 1.13 of these.
    assert errors[0] < 0.5 and errors[0] < errors[1] < 1.13
