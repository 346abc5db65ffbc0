"""A decoding step through the kernel, in the interpreter, is the step of the general way."""

import pytest
import torch

import kvsmith.attention
import kvsmith.fused
import kvsmith.hf.seam
from kvsmith.codec import midpoints, normal_levels
from kvsmith.hf import make_cache
from kvsmith.hf.geometry import geometry
from kvsmith.kernels import choice
from kvsmith.kernels.attend_encoded.native import library
from kvsmith.kernels.choice import preferred
from kvsmith.kernels.encode_pack import api as encode
from kvsmith.spec import (
    NUQ,
    CacheSpec,
    CodecSpec,
    Identity,
    LowRank,
    StaticThreshold,
    TensorCodec,
    TopK,
    Uniform,
)
from tests.runtime.models import build, run

NF = TensorCodec(NUQ(bits=4, table="nf"), TopK(0.05))
HADAMARD = TensorCodec(Uniform(bits=4), rotation="hadamard")
KIVI = CodecSpec(
    TensorCodec(Uniform(bits=2, axis="channel", group_size=32)),
    TensorCodec(Uniform(bits=2, group_size=16)),
    sinks=0,
    recent=32,
    block_size=32,
)
GEAR = CodecSpec(
    TensorCodec(Uniform(bits=2, axis="channel", group_size=32), TopK(0.05), LowRank(2)),
    TensorCodec(Uniform(bits=2), TopK(0.05), LowRank(2, bits=4)),
    key_domain="post",
    sinks=0,
    recent=0,
    block_size=32,
)
CODECS = {
    "pre": CodecSpec(NF, NF, recent=16),
    "post": CodecSpec(NF, NF, recent=16, key_domain="post"),
    "kivi": KIVI,
    "had": CodecSpec(HADAMARD, HADAMARD, recent=16, key_domain="post"),
    "gear": GEAR,
}
# The first token after the prompt completes a block.
STEPS = (83, 1, 2, 1)


@pytest.fixture
def steps(monkeypatch):
    """Have triton wherever it can run; collects which steps it ran."""
    ran = []

    def noted(*args):
        part = attend_step(*args)
        ran.append(part is not None)
        return part

    attend_step = kvsmith.fused.attend_step
    monkeypatch.setattr(kvsmith.attention, "attend_step", noted)
    monkeypatch.setenv("KVSMITH_KERNELS", "triton")
    # Its own kernel is slow in the interpreter, and tested apart.
    monkeypatch.setattr(encode, "preferred", lambda device: "reference")
    return ran


def logits(model, spec, ids, mask, monkeypatch, kernels):
    monkeypatch.setenv("KVSMITH_KERNELS", kernels)
    return run(model, ids, make_cache(model, CacheSpec(spec, page_size=64)), STEPS, mask)


@pytest.mark.parametrize(
    ("family", "codec", "padded"),
    [
        ("llama", "pre", True),
        ("llama", "post", True),
        ("cohere", "kivi", False),
        ("llama", "had", False),
        ("llama", "gear", True),
        ("mistral", "pre", True),
        ("glm", "pre", True),
    ],
)
def test_steps_agree(family, codec, padded, steps, monkeypatch):
    model, ids, mask = build(family), torch.randint(3, 97, (2, sum(STEPS))), None
    if padded:
        mask = torch.ones_like(ids)
        mask[1, :37] = 0
    got = logits(model, CODECS[codec], ids, mask, monkeypatch, "triton")
    # The prompt comes in one piece and attends to itself; every later step is the kernel's.
    layers = model.config.num_hidden_layers
    assert steps.count(True) == layers * (len(STEPS) - 1)
    want = logits(model, CODECS[codec], ids, mask, monkeypatch, "reference")
    real = 37 if padded else 0
    # Codes agree but where a key lies on a boundary; attention differs by rounding.
    assert (got - want)[:, max(real, STEPS[0]) :].abs().max() < 1e-3 * want.std()


@pytest.mark.skipif(library(16, 16) is None, reason="no C compiler")
@pytest.mark.parametrize(
    ("family", "codec", "padded"),
    [
        ("llama", "pre", True),
        ("llama", "kivi", False),
        ("mistral", "post", True),
        *((family, "pre", True) for family in ("phi", "stablelm", "gpt_neox", "glm", "cohere")),
        ("cohere2", "kivi", False),
        ("gpt_oss", "pre", False),
    ],
)
def test_steps_agree_on_a_cpu(family, codec, padded, steps, monkeypatch):
    model, ids, mask = build(family), torch.randint(3, 97, (2, sum(STEPS))), None
    if padded:
        mask = torch.ones_like(ids)
        mask[1, :37] = 0
    got = logits(model, CODECS[codec], ids, mask, monkeypatch, "auto")
    assert steps.count(True) == model.config.num_hidden_layers * (len(STEPS) - 1)
    want = logits(model, CODECS[codec], ids, mask, monkeypatch, "reference")
    # Codes agree but where a key lies on a boundary; attention differs by rounding.
    assert (got - want)[:, STEPS[0] :].abs().max() < 1e-3 * want.std()


CALIBRATED = TensorCodec(NUQ(bits=4, axis="channel", range="calibrated"), StaticThreshold(0.05))
IDENTITY = TensorCodec(Identity())


def ranges(layers, heads, dim):
    """Parameters of `CALIBRATED` keys; every channel has a range of its own."""
    lut = normal_levels(4)
    table, width = {"lut": lut, "edges": midpoints(lut)}, torch.arange(1.0, heads * dim + 1)
    table |= {"scale": width.view(heads, dim) / 32 + 0.2, "zero": width.view(heads, dim) / 200}
    return {f"layers.{i}.k.{n}": t for i in range(layers) for n, t in table.items()}


@pytest.mark.skipif(library(16, 16) is None, reason="no C compiler")
@pytest.mark.parametrize("family", ["phi", "stablelm", "gpt_neox", "glm", "cohere"])
@pytest.mark.parametrize(
    ("codec", "kernels"),
    [(CALIBRATED, "auto"), (CALIBRATED, "reference"), (IDENTITY, "auto")],
    ids=["kernel", "tiles", "dense"],
)
def test_the_order_of_a_keys_channels_is_free(family, codec, kernels, steps, monkeypatch):
    model, ids = build(family), torch.randint(3, 97, (2, 84))
    spec = CacheSpec(CodecSpec(codec, NF, recent=16), page_size=32)
    shape = geometry(model.config).layers

    def answer():
        own = ranges(len(shape), shape[0].kv_heads, shape[0].k_dim)
        cache = make_cache(model, spec, own if codec is CALIBRATED else {})
        first = run(model, ids[:, :70], cache, (64, 6), None)
        cache.crop(-20)  # into a block
        return torch.cat([first, run(model, ids[:, 50:], cache, (1, 32, 1), None)], 1), cache

    monkeypatch.setenv("KVSMITH_KERNELS", kernels)
    got, cache = answer()
    assert cache.stores[0].pairing.order is not None
    assert any(steps) == (codec is CALIBRATED and kernels == "auto")
    monkeypatch.setenv("KVSMITH_KERNELS", "reference")
    monkeypatch.setattr(kvsmith.hf.seam, "find_pairing", lambda *_: None)
    want, natural = answer()
    assert natural.stores[0].pairing is None
    assert natural.nbytes() == cache.nbytes()
    # Sums in another order, and a key on the boundary of a code.
    assert (got - want).abs().max() < 1e-3 * want.std()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kernels", ["triton", "auto"])
def test_pages_of_two_ranks_are_read_by_a_call_each(kernels, turned, steps, monkeypatch):
    if kernels == "auto" and library(16, 16) is None:
        pytest.skip("no C compiler")
    calls = []

    def noted(*args, **given):
        calls.append((given["windows"], given["impl"]))
        return attend_encoded(*args, **given)

    attend_encoded = kvsmith.fused.attend_encoded
    monkeypatch.setattr(kvsmith.fused, "attend_encoded", noted)
    side = TensorCodec(Uniform(4), None, LowRank(1, 3), rotation="hadamard" if turned else None)
    spec = CodecSpec(side, side, key_domain="post", sinks=4, recent=0, block_size=32)
    # One page of the prompt's; the third step completes a block of another, which is then read.
    model, sizes = build("llama"), (70, 29, 1, 2)
    ids, mask = torch.randint(3, 97, (2, sum(sizes))), torch.ones(2, sum(sizes), dtype=torch.int64)
    mask[1, :9] = 0
    found = {}
    for way in ("reference", kernels):
        monkeypatch.setenv("KVSMITH_KERNELS", way)
        cache = make_cache(model, CacheSpec(spec, page_size=64))
        found[way] = run(model, ids, cache, sizes, mask)
    layers, impl = model.config.num_hidden_layers, "triton" if kernels == "triton" else "native"
    assert calls == [(True, impl)] * layers + [(False, impl), (True, impl)] * layers
    got, want = found[kernels], found["reference"]
    assert (got - want)[:, sizes[0] :].abs().max() < 1e-3 * want.std()


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}])
def test_generate_runs_on_the_kernel(mode, steps, monkeypatch):
    model, ids = build("llama"), torch.randint(3, 97, (1, 60))
    if not mode:
        monkeypatch.setattr(encode, "preferred", preferred)
    options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, **mode}
    spec = CacheSpec(CODECS["pre"], page_size=32)
    got = model.generate(ids, past_key_values=make_cache(model, spec), **options)
    assert any(steps)
    monkeypatch.setenv("KVSMITH_KERNELS", "reference")
    want = model.generate(ids, past_key_values=make_cache(model, spec), **options)
    assert torch.equal(got, want)


def test_what_the_kernel_does_not_serve_goes_the_general_way(steps, monkeypatch):
    model, ids = build("llama"), torch.randint(3, 97, (1, sum(STEPS)))
    low = TensorCodec(Uniform(bits=4), low_rank=LowRank(rank=2))
    # A term of keys before RoPE; tokens that are encoded at once.
    for spec in (CodecSpec(low, low), CodecSpec(NF, NF, recent=0, block_size=1)):
        cache = make_cache(model, CacheSpec(spec, page_size=16))
        run(model, ids, cache, STEPS, None)
    holes = torch.ones_like(ids)
    holes[0, 40] = 0
    run(model, ids, make_cache(model, CacheSpec(CODECS["pre"])), STEPS, holes)
    gaps = torch.arange(ids.shape[1])[None].clone()
    gaps[0, 50:] += 7
    cache = make_cache(model, CacheSpec(CODECS["pre"]))
    with torch.no_grad():
        model(ids[:, :83], position_ids=gaps[:, :83], past_key_values=cache)
        model(ids[:, 83:84], position_ids=gaps[:, 83:84], past_key_values=cache)
    assert steps and not any(steps)


def test_the_environment_chooses(monkeypatch):
    device = torch.device("cpu")
    for value, want in (("auto", "reference"), ("triton", "triton"), ("reference", "reference")):
        monkeypatch.setenv("KVSMITH_KERNELS", value)
        assert preferred(device) == want
        assert preferred(device, native=True) == ("native" if value == "auto" else want)
    monkeypatch.setenv("KVSMITH_KERNELS", "auto")
    for installed, want in ((True, "triton"), (False, "reference")):
        monkeypatch.setattr(choice, "has_triton", lambda found=installed: found)
        assert preferred(torch.device("cuda")) == want
    monkeypatch.setenv("KVSMITH_KERNELS", "cuda")
    with pytest.raises(ValueError, match="KVSMITH_KERNELS must be auto, triton or reference, got"):
        preferred(device)
