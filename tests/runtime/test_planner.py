"""Plans say what the runtime allocates, on every kind of layer; mistakes are one line."""

import pytest
import torch
from transformers import Qwen3NextConfig

import kvsmith
from kvsmith.devices import DEVICES, device_by_name
from kvsmith.geometry import LayerGeometry, ModelGeometry
from kvsmith.hf import make_cache
from kvsmith.hf.shapes import SHAPES, find_config, model_facts, shape_config
from kvsmith.planner import held, make_plan, parts, share
from kvsmith.plans import Load
from kvsmith.spec import NUQ, CacheSpec, CodecSpec, Identity, TensorCodec, TopK, Uniform
from kvsmith.spread import part_of, spread
from kvsmith.units import parse_bytes, parse_count, show_bytes, show_count
from tests.runtime.models import build, run

PER_TOKEN = TensorCodec(NUQ(bits=3, table="nf"), TopK(0.05))
GROUPED = CodecSpec(
    TensorCodec(Uniform(bits=2, axis="channel", group_size=16)),
    TensorCodec(Uniform(bits=4, group_size=8)),
    key_domain="post",
    sinks=0,
)
CACHES = {
    "pre": CacheSpec(CodecSpec(PER_TOKEN, PER_TOKEN), page_size=32),
    "post": CacheSpec(GROUPED, page_size=32),
    "none": CacheSpec(CodecSpec(TensorCodec(Identity()), TensorCodec(Identity())), page_size=32),
}
# Grouped, multi-query and multi-head layers, sliding windows, layers that share, heads that differ,
# no RoPE, ALiBi, and RoPE from tables.
ARCHITECTURES = [
    "llama",
    "llama-mqa",
    "llama-mha",
    "mistral",
    "gemma3",
    "gemma3n",
    "gemma4",
    "phi",
    "gpt2",
    "gptj",
    "falcon-rope",
    "falcon-alibi",
    "gpt_oss",
    "smollm3",
]


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("name", CACHES)
def test_a_plan_equals_what_is_allocated(family, name):
    model, spec = build(family, layers=4), CACHES[name]
    facts = model_facts(family, model.config)
    assert facts.weights == sum(p.numel() for p in model.parameters())
    for batch, tokens in ((1, 150), (2, 185)):
        cache, ids = make_cache(model, spec), torch.randint(3, 97, (batch, tokens + 24))
        run(model, ids[:, :tokens], cache, (tokens,), None)
        assert cache.bytes() == held(facts, spec, batch, tokens, torch.float32)
        run(model, ids[:, tokens:], cache, (1,) * 24, None)
        assert cache.bytes() == held(facts, spec, batch, tokens + 24, torch.float32)


def test_hybrid_layers_that_do_not_grow_are_not_counted():
    config = Qwen3NextConfig(num_hidden_layers=8, hidden_size=64, vocab_size=97)
    facts = model_facts("hybrid", config)
    assert len(facts.geometry.layers) == 2 and facts.fixed == 6
    plan = make_plan(facts, DEVICES["t4"], Load(1000), CACHES)
    assert any("6 layers keep a state of fixed size" in note for note in plan.notes)


def test_known_shapes_are_those_published():
    counted = {n: model_facts(n, shape_config(n)).weights / 1e9 for n in SHAPES}
    published = {
        "llama2-7b": 6.738,
        "llama2-13b": 13.016,
        "llama3-8b": 8.030,
        "llama3.1-8b": 8.030,
        "llama3-70b": 70.554,
        "mistral-7b": 7.242,
        "qwen2.5-7b": 7.616,
        "qwen3-8b": 8.191,
        "gemma3": 1.0,
        "phi3": 3.821,
        "falcon-7b": 6.922,
        "pythia-160m": 0.162,
    }
    assert {n: round(c, 3) for n, c in counted.items()} == published


def test_ten_million_tokens_in_one_h200():
    codecs = {"nuq2": CacheSpec(CodecSpec(*[TensorCodec(NUQ(bits=2, table="nf"), TopK(0.01))] * 2))}
    with pytest.warns(UserWarning, match="beyond the 8,192 positions"):
        plan = kvsmith.plan("llama3-8b", "h200", "10M", codecs, factor=2)
    found = plan["nuq2"]
    assert found.fits and found.longest > 10_000_000 and found.rows == 1
    # 32 layers of 8 KV heads of 128, half of them stored, 2 bits and 1 % of 32-bit corrections.
    assert 32 * 8 * 128 * (2 + 0.32) / 8 < found.bytes_per_token < 32 * 8 * 128 * 2.36 / 8
    assert found.read == pytest.approx(2 * found.cache, rel=1e-3)  # sharing saves no reading
    assert found.seconds == pytest.approx((found.read + 2 * plan.model.read) / 4.8e12)
    assert any("positions" in note for note in plan.notes)
    alone = model_facts("llama3-8b", shape_config("llama3-8b"))
    assert not make_plan(alone, plan.device, plan.load, codecs)["nuq2"].fits


def test_ten_million_tokens_over_eight_devices():
    facts = model_facts("llama3.1-8b", shape_config("llama3.1-8b"))
    spec = CacheSpec(CodecSpec(*[TensorCodec(NUQ(bits=4, table="nf"), TopK(0.01))] * 2))
    load = Load(10_000_000, devices=8)
    plan = make_plan(facts, DEVICES["h100"], load, {"nuq4": spec})
    found = plan["nuq4"]
    assert found.fits and not make_plan(facts, DEVICES["h100"], Load(10**7), {"x": spec})["x"].fits
    # 4 of 32 layers on each; the first and the last hold a table of 128256 x 4096 too.
    alone = [p.nbytes(1, 10**7) for p in parts(facts, spec, load)]
    assert len(alone) == 3, "the first, the last, and those between are alike"
    table = 2 * 128256 * 4096
    assert alone[2] - alone[1] == pytest.approx(table, abs=4)
    assert alone[0] - alone[1] == table + 4 * 10**7, "position ids, and as many pages as tokens"
    total = alone[0] + 6 * alone[1] + alone[2]
    assert total == pytest.approx(2 * facts.weights + found.cache, rel=1e-9)
    assert found.fullest == alone[0] + plan.activations
    assert found.seconds == make_plan(facts, DEVICES["h100"], Load(10**7), {"x": spec})["x"].seconds
    assert (
        plan.room == 8 * (DEVICES["h100"].memory - plan.activations - plan.reserve) - plan.weights
    )
    again = make_plan(facts, DEVICES["h100"], Load(found.longest, devices=8), {"x": spec})["x"]
    assert again.fits and again.longest == found.longest


def test_layers_are_spread_evenly_and_readers_stay_with_their_owners():
    one = LayerGeometry(2, 4, 8, 8)
    shape = ModelGeometry((one,) * 6)
    assert spread(shape, 4) == (range(0, 1), range(1, 3), range(3, 4), range(4, 6))
    assert spread(shape, 6) == tuple(range(i, i + 1) for i in range(6))
    paired = ModelGeometry((one,) * 6, (0, 0, 2, 2, 2, 5))
    assert spread(paired, 3) == (range(0, 2), range(2, 5), range(5, 6))
    assert part_of(paired, range(2, 5)).owner == (0, 0, 0)
    with pytest.raises(ValueError, match="devices: value must be between 1 and 3, since"):
        spread(paired, 4)


def test_what_is_said_to_fit_fits_and_one_more_does_not():
    facts = model_facts("llama3-8b", shape_config("llama3-8b"))
    device = device_by_name("RTX 4090")
    plan = make_plan(facts, device, Load(5000, batch=2), CACHES)
    for option in plan.options:
        for rows, tokens, fits in (
            (2, option.longest, True),
            (2, option.longest + 32, False),
            (option.rows, 5000, True),
            (option.rows + 1, 5000, False),
        ):
            again = make_plan(facts, device, Load(tokens, batch=rows), {"x": option.spec})["x"]
            assert again.fits == fits


def test_layers_of_equal_shape_share():
    wide, narrow = LayerGeometry(2, 4, 8, 8), LayerGeometry(2, 4, 8, 8, window=16)
    shape = ModelGeometry((wide, narrow, wide, narrow, wide, narrow))
    assert share(shape, 1) == shape
    assert share(shape, 2).owner == (0, 1, 0, 1, 4, 5)
    assert share(ModelGeometry((wide,) * 5), 2).owner == (0, 0, 2, 2, 4)
    assert share(ModelGeometry((wide,) * 4, owner=(0, 0, 2, 3)), 2).owner == (0, 0, 0, 3)
    with pytest.raises(ValueError, match="factor: value must be between 1 and 6 layers, got 7"):
        share(shape, 7)


def test_a_device_too_small_says_so():
    plan = kvsmith.plan("llama3-70b", "t4", 1000, CACHES)
    assert plan.room < 0 and all(o.longest == o.rows == 0 and not o.fits for o in plan.options)


def test_caches_that_the_shape_cannot_hold_are_left_out_and_named():
    odd = CacheSpec(CodecSpec(*[TensorCodec(Uniform(group_size=48))] * 2))
    plan = kvsmith.plan("llama3-8b", "h100", 1000, {"odd": odd, **CACHES})
    assert [o.codec for o in plan.options] == list(CACHES)
    assert any(n.startswith("odd is left out: ") and "group_size" in n for n in plan.notes)
    with pytest.raises(KeyError):
        plan["odd"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: device_by_name("h20"),
            ValueError,
            r"one of a10g, .* got 'h20'\. Did you mean h200",
        ),
        (
            lambda: find_config("llama9"),
            FileNotFoundError,
            "model: value must be .*llama3-8b.*'llama9'",
        ),
        (lambda: Load(0), ValueError, "context: value must be positive, got 0"),
        (lambda: Load(1, reserve=1.0), ValueError, r"reserve: .* in \[0, 1\)"),
        (
            lambda: parse_count("many", "context"),
            ValueError,
            "context: value must be a number of tok",
        ),
        (lambda: parse_count("20GiB", "context"), ValueError, "got '20GiB'"),
        (lambda: parse_count("-5", "context"), ValueError, "got '-5'"),
        (lambda: parse_count("1.0001k", "context"), ValueError, r"got '1\.0001k'"),
        (lambda: parse_bytes("0", "fit.bytes"), ValueError, "fit.bytes: value must be a size"),
        (lambda: parse_bytes(1.5, "fit.bytes"), ValueError, r"got 1\.5"),
    ],
)
def test_mistakes_are_one_line(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [("200k", 200_000), ("1M", 10**6), ("1.5m", 1_500_000), ("128Ki", 131072), (77, 77)],
)
def test_counts(text, number):
    assert parse_count(text, "context") == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("20GiB", 20 * 2**30), ("80GB", 80 * 10**9), ("1.5 MiB", 3 * 2**19), ("1_000", 1000)],
)
def test_sizes(text, number):
    assert parse_bytes(text, "fit.bytes") == number


def test_sizes_are_shown_with_three_digits():
    shown = [show_bytes(n) for n in (5, 1500, 2.5e6, 20e9, 1.311e12)]
    assert shown == ["5 B", "1.5 kB", "2.5 MB", "20 GB", "1,311 GB"]
    assert [show_count(n) for n in (512, 200_000, 12_146_467, 2 * 10**9)] == [
        "512",
        "200k",
        "12.15M",
        "2,000M",
    ]
