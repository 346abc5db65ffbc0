"""A decoding step through the kernel, in the interpreter, is the step of the general way."""

import pytest
import torch

import kvsmith.attention
import kvsmith.fused
from kvsmith.hf import make_cache
from kvsmith.kernels import choice
from kvsmith.kernels.attend_encoded.native import library
from kvsmith.kernels.choice import preferred
from kvsmith.kernels.encode_pack import api as encode
from kvsmith.spec import NUQ, CacheSpec, CodecSpec, LowRank, TensorCodec, TopK, Uniform
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
        ("llama", "kivi", False),
        ("llama", "had", False),
        ("llama", "gear", True),
        ("mistral", "pre", True),
        ("qwen3", "pre", False),
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
    [("llama", "pre", True), ("llama", "kivi", False), ("mistral", "post", True)],
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
    # A term of keys before RoPE; pages of two ranks; tokens that are encoded at once.
    two = TensorCodec(Uniform(bits=4), low_rank=LowRank(rank=2, prompt_rank=4))
    for spec in (
        CodecSpec(low, low),
        CodecSpec(two, two, key_domain="post"),
        CodecSpec(NF, NF, recent=0, block_size=1),
    ):
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
