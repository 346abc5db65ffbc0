"""States of layers that others read: they train on what decoding shows them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvsmith.hf import make_cache, share
from kvsmith.less.features import feature_map
from kvsmith.less.spec import Less
from kvsmith.pipeline.less.layers import initial
from kvsmith.pipeline.less.options import LessTraining
from kvsmith.pipeline.less.parallel import attend_state
from kvsmith.pipeline.less.record import replay
from kvsmith.pipeline.less.training import projections
from kvsmith.spec import CacheSpec
from kvsmith.stores import make_store
from tests.pipeline.test_less import CODEC, FEATURES, POLICIES, activations
from tests.runtime.models import build


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.kind)
@pytest.mark.parametrize("features", FEATURES, ids=lambda f: f.kind)
def test_readers_of_one_store_train_as_they_decode(policy: Any, features: Any) -> None:
    """Two layers read one store; the first says nothing, so that the second sees the same."""
    model = build("llama", layers=2)
    model.model.layers[0].self_attn.o_proj.weight.zero_()
    share(model, (0, 0))
    ids = torch.randint(3, 97, (2, 61))
    (seen,) = activations(model, ids)
    spec = CacheSpec(CODEC, policy, page_size=16)
    shape = make_cache(model, spec).geometry
    gone = replay(seen, make_store(spec, shape, 0, {}))  # type: ignore[arg-type]
    assert gone is not None and seen.q.shape[1] == 2 * shape.layers[0].query_heads
    cfg = LessTraining(features, rank=3, trained_ranks=(3,))
    own = initial(cfg, 0, shape.joined(0), seen, gone, projections(model)[0])
    own = {n: t + 0.3 * torch.randn(t.shape) for n, t in own.items()}
    maps = feature_map(features, own)
    got = gone.kept.merge(attend_state(maps, 3, seen.q[:, :, 24:60], gone)).out
    full = replace(spec, less=Less(features, rank=3, store_dtype="float32"))
    cache = make_cache(model, full, {f"layers.0.less.{n}": t for n, t in own.items()})
    outs: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, i=i: outs[i].append(args[0])
        )
    for token in ids[:, :60].split(1, dim=1):
        model(token, past_key_values=cache, use_cache=True)
    heads = shape.layers[0].kv_heads
    want = torch.stack(
        [torch.cat(outs[i], 1)[:, 24:].unflatten(-1, (heads, -1, 16)) for i in (0, 1)], 3
    )  # [B, T, H, readers, G, D]
    torch.testing.assert_close(got, want.flatten(2, 4).transpose(1, 2), rtol=0, atol=2e-5)
