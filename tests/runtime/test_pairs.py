"""Every family of codecs with every way of forgetting, with and without a state, by bundle."""

import re
from dataclasses import replace

import pytest
import torch

from kvsmith.bundle import Bundle, base_model, expected_tensors, load
from kvsmith.eviction.policy import H2O, TOVA, KeepAll, Lambda
from kvsmith.hf import geometry
from kvsmith.less.spec import Less
from kvsmith.pipeline.codecs import codec_names, load_codec
from kvsmith.sizes import cache_bytes
from kvsmith.spec import CacheSpec

BUDGET, TOKENS = 200, 230  # room for two blocks of 64, and then a block leaves
POLICIES = (Lambda(BUDGET), H2O(BUDGET), TOVA(BUDGET))
WAYS = {
    "keep_all": (KeepAll(), None),
    **{p.kind: (p, None) for p in POLICIES},
    **{f"{p.kind} and a state": (p, Less(rank=4)) for p in POLICIES},
}


def parameters(spec, shape):
    """Values that a bundle of this spec may hold."""
    made = {}
    for name, info in expected_tensors(spec, shape).items():
        made[name] = 0.3 * torch.randn(info.shape)
        if name.endswith((".lut", ".edges")):
            made[name] = torch.linspace(-1, 1, info.shape[0])
        if name.endswith(".scale"):
            made[name] = torch.ones(info.shape)
        if name.endswith(".rotation"):
            made[name] = torch.eye(info.shape[1]).expand(info.shape).contiguous()
    return made


def families():
    """One codec of each family: its width changes no shape but that of codes."""
    names = {re.sub(r"(?<=[a-z])\d", "", n): n for n in codec_names() if "-" not in n}
    return {name: load_codec(name) for name in names.values()}


@pytest.mark.parametrize("way", WAYS)
def test_every_codec_from_a_bundle(way, micro_llama, tmp_path):
    policy, less = WAYS[way]
    model = micro_llama(layers=1, heads=1, kv_heads=1, head_dim=128)
    shape = geometry(model.config)
    base = base_model(model.config.get_text_config(decoder=True).to_dict(), shape, "micro")
    ids = torch.randint(3, 97, (1, TOKENS))
    for name, codec in families().items():
        if "given" in (codec.k.rotation, codec.v.rotation) and policy.kind != "keep_all":
            with pytest.raises(ValueError, match="must be hadamard where tokens are evicted"):
                CacheSpec(codec, policy, less=less)
            continue
        spec = CacheSpec(codec, policy, less=less)
        folder = Bundle.create(spec, parameters(spec, shape), base).save_pretrained(tmp_path / name)
        bundle = load(folder)
        assert bundle.spec == spec
        cache = bundle.cache(model)
        for part in ids.split([TOKENS - 3, 2, 1], dim=1):
            logits = model(part, past_key_values=cache).logits
            assert bool(logits.isfinite().all()), name
        want = cache_bytes(spec, shape, 1, TOKENS, torch.float32, prompt=TOKENS - 3)
        if codec.key_domain == "post":  # no keys wait for RoPE
            want = replace(want, positions=0)
        assert cache.bytes() == want, name
