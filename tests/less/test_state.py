"""The state: recurrent form against the paper's sums, and as one more segment of the runtime."""

import pytest
import torch

from kvsmith.eviction.policy import H2O, TOVA, KeepAll, Lambda
from kvsmith.geometry import LayerGeometry
from kvsmith.hf import make_cache
from kvsmith.layout import check_geometry, less_parameters
from kvsmith.less.features import feature_map
from kvsmith.less.spec import MLP, Exponential, Less, less_tensors
from kvsmith.less.state import State
from kvsmith.sizes import cache_bytes
from kvsmith.spec import (
    NUQ,
    CacheSpec,
    CodecSpec,
    Identity,
    StaticThreshold,
    TensorCodec,
    TopK,
    Uniform,
    slot_tokens,
)
from tests.eviction.test_store import POLICIES, feed, make, rules, tensors
from tests.oracles.less import simulate
from tests.runtime.models import build, run

LAYER = LayerGeometry(2, 4, 16, 16)
MAPS = {"exponential": Exponential(), "mlp": MLP(24)}
IDENTITY = TensorCodec(Identity())


def parameters(features, layer=LAYER, rank=6, seed=0):
    """Random features, strong enough to matter."""
    torch.manual_seed(seed)
    shapes = less_tensors(features, layer, rank)
    return {name: 0.4 * torch.randn(shape) for name, (shape, _) in shapes.items()}


def published(features, own):
    """phi and psi as the paper writes them, in float64."""
    t = {name: x.double() for name, x in own.items()}
    if isinstance(features, Exponential):
        return (
            lambda h, x: torch.exp(x @ t["phi.weight"][h] / 4 + t["phi.bias"][h]),
            lambda h, x: torch.exp(x @ t["psi.weight"][h] / 4 + t["psi.bias"][h]),
        )
    gelu = torch.nn.functional.gelu

    def phi(h, x):
        return gelu(gelu(x @ t["phi.first"][h]) @ t["phi.second"][h]).abs().clamp(min=1e-6)

    def psi(h, x):
        a = t["psi.s1"][h].abs() * gelu(gelu(x @ t["psi.first"][h]) @ t["psi.second"][h])
        return (a + a @ t["psi.third"][h] * t["psi.s2"][h]).abs().clamp(min=1e-6)

    return phi, psi


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("steps", [(1,) * 80, (50, 3, 20, 7)])
def test_recurrent_form_is_the_sum_over_absent_tokens(kind, name, steps):
    policy, own = POLICIES[name], parameters(MAPS[kind])
    q, k, v = tensors(80)
    store, spec = make(policy)
    state = State(feature_map(MAPS[kind], own), 6, "float32")
    store.state = state
    got = feed(store, q, k, v, steps, lambda g: state.fold(g.k, g.v, g.columns >= 0))
    slots = slot_tokens(spec.codec, policy.budget)
    exact = [x[0].double() for x in (q, k, v)]
    maps = published(MAPS[kind], own)
    want, heads = simulate(*exact, rules(policy), 2, 38 - slots, slots, 4, steps, 0.3, maps)
    torch.testing.assert_close(got[0].double(), want, rtol=0, atol=1e-5)
    for h, head in enumerate(heads):
        psi = torch.stack([maps[1](h, exact[1][h, i]) for i in head.folded])
        z = psi.sum(0)
        torch.testing.assert_close(state.log_z[0, h].double(), z.log(), rtol=0, atol=1e-5)
        H = psi.T @ exact[2][h, head.folded]
        torch.testing.assert_close(state.means()[0, h].double(), H / z[:, None], rtol=0, atol=1e-5)


def test_huge_logits_do_not_overflow():
    own = parameters(Exponential())
    own["psi.bias"] += 300.0
    own["phi.bias"] += 300.0
    state = State(feature_map(Exponential(), own), 6, "float16")
    _, k, v = tensors(30)
    state.fold(k, v, torch.ones(1, 2, 30, dtype=torch.bool))
    part = state.partial(torch.randn(1, 4, 3, 16))
    assert part.out.isfinite().all() and (part.lse > 500).all()


@pytest.mark.parametrize(("store", "error"), [("float16", 2e-3), ("int8", 0.1)])
def test_stored_precision(store, error):
    """Rounded after each block: float16 stays close; int8 loses small contributions."""
    own = parameters(Exponential())
    exact, rough = (State(feature_map(Exponential(), own), 6, s) for s in ("float32", store))
    for _ in range(40):
        _, k, v = tensors(8)
        for state in (exact, rough):
            state.fold(k, v, torch.ones(1, 2, 8, dtype=torch.bool))
    assert 0 < (exact.means() - rough.means()).abs().max() < error
    size = sum(t.nbytes for kind, t in rough.tensors() if kind == "state")
    assert size == 2 * 6 * (4 + (2 * 16 if store == "float16" else 16 + 4))


def test_rows_without_evicted_tokens_are_neutral_and_rows_move():
    state = State(feature_map(Exponential(), parameters(Exponential())), 6, "float16")
    _, k, v = tensors(8, batch=2)
    valid = torch.ones(2, 2, 8, dtype=torch.bool)
    valid[1] = False
    state.fold(k, v, valid)
    q = torch.randn(2, 4, 3, 16)
    part = state.partial(q)
    assert part.lse[1].isneginf().all() and (part.out[1] == 0).all()
    state.map_rows(lambda t: t[torch.tensor([1, 0, 0])])
    moved = state.partial(q[[1, 0, 0]])
    assert torch.equal(moved.lse, part.lse[[1, 0, 0]])


CODECS = {
    "identity": (IDENTITY, IDENTITY),
    "integers": (TensorCodec(Uniform(bits=4)), TensorCodec(Uniform(bits=4, group_size=8))),
    "kivi": (
        TensorCodec(Uniform(bits=4, axis="channel", group_size=4)),
        TensorCodec(Uniform(bits=2, group_size=8)),
    ),
    "kvquant": (
        TensorCodec(NUQ(bits=4, axis="channel", range="calibrated"), StaticThreshold(0.02)),
        TensorCodec(NUQ(bits=3), TopK(0.05)),
    ),
    "nf": (TensorCodec(NUQ(bits=3, table="nf"), TopK(0.05)), TensorCodec(NUQ(table="nf"))),
}
STATES = (None, "float16", "int8")
PAIRS = [(KeepAll(), None), *((e, s) for e in (Lambda(32), H2O(32), TOVA(32)) for s in STATES)]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("eviction", "less"), PAIRS, ids=lambda x: getattr(x, "kind", str(x)))
def test_every_codec_every_policy_with_and_without_a_state(codec, eviction, less):
    k, v = CODECS[codec]
    windows = {"sinks": 2, "recent": 4, "block_size": 4}
    model = build("llama")
    state = None if less is None else Less(rank=4, ranks=(2, 6), store_dtype=less)
    spec = CacheSpec(CodecSpec(k, v, **windows), eviction, page_size=16, less=state)
    cache = make_cache(model, spec, _all_parameters(spec))
    ids = torch.randint(3, 97, (2, 56))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    for seen in (None, mask):
        cache.reset()
        out = run(model, ids, cache, (40, 5) + (1,) * 11, seen)
        assert out.isfinite().all()
        want = cache_bytes(spec, cache.geometry, 2, 56, torch.float32)
        assert cache.bytes() == want and cache.nbytes() == want.total
    if state is not None:
        assert want.state == sum(
            2 * 2 * r * (4 + (2 * 16 if less == "float16" else 16 + 4)) for r in (2, 6)
        )


def _all_parameters(spec):
    from kvsmith.bundle import expected_tensors
    from kvsmith.geometry import ModelGeometry

    geometry = ModelGeometry((LAYER,) * 2)
    torch.manual_seed(1)
    made = {}
    for name, info in expected_tensors(spec, geometry).items():
        made[name] = 0.3 * torch.randn(info.shape)
        if name.endswith((".lut", ".edges")):
            made[name] = torch.linspace(-1, 1, info.shape[0])
        if name.endswith(".scale"):
            made[name] = torch.ones(info.shape)
    return made


@pytest.mark.parametrize("family", ["llama-mqa", "llama-mha", "gpt2", "gpt_oss", "gemma3n"])
def test_a_state_runs_in_generate_with_beams(family):
    model = build(family, layers=4 if family == "gemma3n" else 2)
    codec = CodecSpec(IDENTITY, IDENTITY, sinks=2, recent=4, block_size=4)
    spec = CacheSpec(codec, H2O(32), less=Less(rank=4))
    shape = make_cache(model, CacheSpec(codec)).geometry
    torch.manual_seed(1)
    own = {n: 0.1 * torch.randn(i.shape) for n, i in less_parameters(spec, shape).items()}
    cache = make_cache(model, spec, own)
    ids = torch.randint(3, 97, (2, 60))
    out = model.generate(
        ids, past_key_values=cache, num_beams=2, do_sample=False, max_new_tokens=12, pad_token_id=0
    )
    assert out.shape == (2, 72)
    states = [s.state for s in cache.stores.values() if getattr(s, "state", None) is not None]
    assert states and all(s.log_z.isfinite().all() and s.log_z.shape[0] == 4 for s in states)


def test_what_does_not_fit_is_refused_in_one_line():
    codec = CodecSpec(IDENTITY, IDENTITY, sinks=2, recent=4, block_size=4)
    model = build("llama")
    spec = CacheSpec(codec, H2O(32), less=Less(rank=4))
    shape = make_cache(model, CacheSpec(codec)).geometry
    own = {n: torch.zeros(i.shape) for n, i in less_parameters(spec, shape).items()}
    missing = {n: t for n, t in own.items() if not n.startswith("layers.1.")}
    with pytest.raises(ValueError, match=r"layers\.1\.less\.phi\.weight: parameter must be pres"):
        make_cache(model, spec, missing)
    other = CacheSpec(codec, H2O(32), less=Less(rank=8))
    with pytest.raises(ValueError, match=r"less\.phi\.weight: shape must be \(4, 16, 8\), got"):
        make_cache(model, other, own)
    wrong = CacheSpec(codec, H2O(32), less=Less(ranks=(4, 4, 4)))
    with pytest.raises(ValueError, match=r"ranks must be one for each of the 2 layers that evict"):
        check_geometry(wrong, shape)
    with pytest.raises(
        ValueError, match=r"cache\.less: model must be one with layers without a sl"
    ):
        make_cache(build("mistral"), spec)
