"""The cache inside transformers: with nothing compressed it must not be noticed."""

import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

from kvsmith.hf import make_cache, observe_kv
from kvsmith.sizes import cache_bytes
from kvsmith.spec import NUQ, CacheSpec, CodecSpec, Identity, TensorCodec, TopK, Uniform
from tests.runtime.models import build, run

NOTHING = CacheSpec(CodecSpec(TensorCodec(Identity()), TensorCodec(Identity())))
LOW = CodecSpec(
    TensorCodec(NUQ(bits=4, table="nf"), TopK(0.02)), TensorCodec(NUQ(bits=4, table="nf"))
)
FAMILIES = ["llama", "llama-mqa", "llama-mha", "mistral", "qwen2", "qwen3"]


@pytest.fixture
def ids():
    return torch.randint(3, 97, (2, 90))


@pytest.fixture
def padded(ids):
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    return mask


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("domain", ["pre", "post"])
@pytest.mark.parametrize("steps", [(90,), (24, 1, 1, 30, 34), (10, 70) + (1,) * 10])
def test_logits_equal_dynamic_cache(family, domain, steps, ids, padded):
    model = build(family)
    spec = CacheSpec(CodecSpec(TensorCodec(Identity()), TensorCodec(Identity()), key_domain=domain))
    for mask, real in ((None, 0), (padded, 17)):
        want = run(model, ids, DynamicCache(config=model.config), steps, mask)
        cache = make_cache(model, spec)
        got = run(model, ids, cache, steps, mask)
        torch.testing.assert_close(got[:, real:], want[:, real:], rtol=0, atol=1e-5)
        assert cache.get_seq_length() == 90
        # Attached, but without our cache: unchanged.
        again = run(model, ids, DynamicCache(config=model.config), steps, mask)
        assert torch.equal(again[:, real:], want[:, real:])


def test_bfloat16_differs_by_rounding_only(ids):
    model = build("llama").bfloat16()
    exact = run(build("llama"), ids, DynamicCache(), (24, 66), None)
    plain = run(model, ids, DynamicCache(config=model.config), (24, 66), None).float()
    ours = run(model, ids, make_cache(model, NOTHING), (24, 66), None).float()
    # Both round to 8 bits in different places; neither may be farther from float32 than twice the
    # other.
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()


GENERATION = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beam": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", GENERATION)
def test_generate_is_the_same_token_for_token(family, mode, ids, padded):
    model = build(family)
    options = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": 0, **GENERATION[mode]}
    prompt = {"input_ids": ids[:, :50], "attention_mask": padded[:, :50]}
    torch.manual_seed(7)
    want = model.generate(**prompt, **options)
    torch.manual_seed(7)
    got = model.generate(**prompt, past_key_values=make_cache(model, NOTHING), **options)
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_assisted_generation_crops(family, ids):
    model = build(family)
    options = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": 0}
    want = model.generate(ids[:1, :50], **options)
    cache = make_cache(model, NOTHING)
    got = model.generate(ids[:1, :50], past_key_values=cache, prompt_lookup_num_tokens=4, **options)
    assert torch.equal(got, want)
    small = build(family, layers=1, seed=3)
    got = model.generate(
        ids[:1, :50], past_key_values=make_cache(model, NOTHING), assistant_model=small, **options
    )
    assert torch.equal(got, want)


def test_chunked_prefill_and_several_turns(ids):
    model = build("llama")
    options = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0}
    want = model.generate(ids[:1, :60], **options)
    cache = make_cache(model, NOTHING)
    got = model.generate(ids[:1, :60], past_key_values=cache, prefill_chunk_size=16, **options)
    assert torch.equal(got, want)
    # The second turn goes on from the same cache.
    turn = torch.cat([got, ids[:1, 60:75]], dim=1)
    want = model.generate(turn, **options)
    assert torch.equal(model.generate(turn, past_key_values=cache, **options), want)


@pytest.mark.parametrize("rows", [1, 3])
def test_allocated_bytes_are_the_specified_bytes(rows):
    model = build("llama")
    for codec in (NOTHING.codec, LOW, CodecSpec(LOW.k, LOW.v, sinks=0, recent=0, block_size=32)):
        spec = CacheSpec(codec)
        for length in (3, 40, 300):
            ids = torch.randint(3, 97, (rows, length))
            cache = make_cache(model, spec)
            run(model, ids, cache, (length,), None)
            want = cache_bytes(spec, cache.geometry, rows, length, torch.float32)
            assert cache.bytes() == want and cache.nbytes() == want.total


def test_compression_costs_little_at_four_bits_and_more_at_one(ids):
    model = build("llama")
    want = run(model, ids, DynamicCache(), (40, 50), None)
    cache = make_cache(model, CacheSpec(LOW))
    got = run(model, ids, cache, (40, 50), None)
    error = (got - want).abs().mean()
    assert 0 < error < 0.2 * want.std()
    rough = make_cache(
        model, CacheSpec(CodecSpec(TensorCodec(Uniform(bits=1)), TensorCodec(Uniform(bits=1))))
    )
    assert (run(model, ids, rough, (40, 50), None) - want).abs().mean() > 2 * error


def test_padding_does_not_change_a_row(ids):
    """Static and per-token ranges: a row says the same alone and padded in a batch."""
    model = build("llama")
    options = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 0}
    long, short = ids[:1, :60], ids[1:, :43]
    batch = torch.cat([long, torch.cat([torch.zeros(1, 17, dtype=torch.long), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :17] = 0
    codec = CodecSpec(LOW.k, LOW.v, recent=16, block_size=1)

    def cache():
        return make_cache(model, CacheSpec(codec))

    together = model.generate(batch, attention_mask=mask, past_key_values=cache(), **options)
    alone = model.generate(long, past_key_values=cache(), **options)
    assert torch.equal(together[:1, 60:], alone[:, 60:])
    alone = model.generate(short, past_key_values=cache(), **options)
    assert torch.equal(together[1:, 60:], alone[:, 43:])


def test_beam_search_reorders_encoded_pages(ids):
    model = build("llama")
    options = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0, "num_beams": 4}
    cache = make_cache(model, CacheSpec(LOW))
    out = model.generate(ids[:, :60], past_key_values=cache, **options)
    assert out.shape == (2, 80) and cache.stores[0].batch_size == 8


def test_no_dense_copy_of_the_cache_is_made(monkeypatch):
    """Decoding hands out at most a chunk of tokens at a time."""
    import kvsmith.attention as attention
    from kvsmith.store import LayerStore

    monkeypatch.setenv("KVSMITH_KERNELS", "reference")  # the other reads pages in place
    monkeypatch.setattr(attention, "CHUNK_ELEMENTS", 1 << 12)
    sizes = []
    original = LayerStore._decode

    def spy(self, *args):
        segment = original(self, *args)
        sizes.append(segment.k.numel())
        return segment

    monkeypatch.setattr(LayerStore, "_decode", spy)
    model = build("llama")
    cache = make_cache(model, CacheSpec(LOW))
    ids = torch.randint(3, 97, (1, 500))
    run(model, ids, cache, (499, 1), None)
    assert max(sizes) <= 1 << 12 and sum(sizes) >= 2 * 480 * 32


def test_observe_kv_sees_what_a_cache_stores_and_its_gradients(ids):
    model = build("llama")
    cache = make_cache(model, NOTHING)
    run(model, ids, cache, (90,), None)
    seen, grads = {}, {}

    def note(layer, k, v):
        seen[layer] = (k, v)
        k.register_hook(lambda g: grads.__setitem__(layer, g))

    with observe_kv(model, note):
        model(ids, labels=ids).loss.backward()
    assert sorted(seen) == sorted(grads) == list(range(len(cache.layers)))
    for layer, (k, v) in seen.items():
        parts = list(cache.stores[layer].segments(90, 4096))
        torch.testing.assert_close(
            k.detach(), torch.cat([p.k for p in parts], 2), rtol=0, atol=1e-6
        )
        torch.testing.assert_close(
            v.detach(), torch.cat([p.v for p in parts], 2), rtol=0, atol=1e-6
        )
        assert grads[layer].abs().sum() > 0
    # Layer 0 sees the token alone: keys before RoPE do not know the position.
    same = torch.full((1, 9), 5)
    with torch.no_grad(), observe_kv(model, lambda layer, k, v: seen.__setitem__(layer, (k, v))):
        model(same)
    assert (seen[0][0][:, :, 0] - seen[0][0][:, :, 8]).abs().max() == 0


def test_gradient_of_the_loss_to_keys_is_right(ids):
    """Against a finite difference at the key that matters most, through the real rotation."""
    model, grad = build("llama"), {}

    def loss(observer):
        with observe_kv(model, observer):
            return model(ids[:1, :20], labels=ids[:1, :20]).loss

    loss(lambda layer, k, v: k.register_hook(lambda g: grad.setdefault(layer, g))).backward()
    place = (grad[1].abs() == grad[1].abs().max()).nonzero()[0].tolist()

    def at(step):
        def nudge(layer, k, v):
            if layer == 1:
                k[tuple(place)] += step

        with torch.no_grad():
            return loss(nudge).item()

    # A step this wide outweighs float32 rounding of the loss, 5e-7; the curvature costs a percent.
    slope = (at(0.05) - at(-0.05)) / 0.1
    assert slope == pytest.approx(grad[1][tuple(place)].item(), rel=0.02)


def test_a_cache_belongs_to_its_model(ids):
    cache = make_cache(build("llama"), NOTHING)
    other = build("llama", layers=3, seed=5)
    with pytest.raises(
        ValueError, match="cache: model must be the one that the cache was made for"
    ):
        other(ids, past_key_values=cache)


def test_unsupported_models_are_refused_by_name():
    from transformers import (
        AutoModelForCausalLM,
        DeepseekV3Config,
        T5Config,
        T5ForConditionalGeneration,
    )

    t5 = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=9)
    )
    with pytest.raises(ValueError, match=r"model \(t5\): architecture must be decoder-only"):
        make_cache(t5, NOTHING)
    mla = DeepseekV3Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, kv_lora_rank=8, vocab_size=97,
        intermediate_size=32, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"model \(deepseek_v3\).*latent attention"):
        make_cache(AutoModelForCausalLM.from_config(mla), NOTHING)


def test_models_and_caches_are_released():
    model = build("llama")
    cache = make_cache(model, NOTHING)
    run(model, torch.randint(3, 97, (1, 8)), cache, (8,), None)
    watch = weakref.ref(model), weakref.ref(cache)
    del model, cache
    gc.collect()
    assert [w() for w in watch] == [None, None]
