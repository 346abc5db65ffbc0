"""EvictingStore: keeps what each policy says, frees the rest, in the bytes that the spec says."""

import pytest
import torch

from kvsmith.attention import Scores
from kvsmith.eviction.attention import attend_kept
from kvsmith.eviction.policy import H2O, TOVA, Lambda
from kvsmith.eviction.tokens import Tokens
from kvsmith.geometry import LayerGeometry, ModelGeometry
from kvsmith.hf.masks import LazyMask
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
from kvsmith.stores import make_store
from tests.oracles.less import simulate

IDENTITY = TensorCodec(Identity())
GEOMETRY = ModelGeometry((LayerGeometry(2, 4, 16, 16),))
POLICIES = {
    "lambda": Lambda(40, sinks=3),
    "lambda-no-sinks": Lambda(40, sinks=0),
    "h2o": H2O(40, recent=12),
    "h2o-sinks": H2O(40, recent=0, sinks=2),
    "h2o-aging": H2O(40, recent=8, aging=0.7),
    "tova": TOVA(40),
}


def rules(policy):
    """A policy as the oracle takes it."""
    return {
        "kind": policy.kind,
        "sinks": policy.sinks,
        "protected": policy.protected,
        "aging": getattr(policy, "aging", 0.0),
    }


def make(policy, codec=IDENTITY, sinks=2, recent=4, block=4, parameters=None):
    spec = CacheSpec(
        CodecSpec(codec, codec, sinks=sinks, recent=recent, block_size=block), policy, page_size=64
    )
    return make_store(spec, GEOMETRY, 0, parameters or {}), spec


def causal(store, T):
    before = store.length - T
    arguments = {"batch_size": 1, "q_length": T, "kv_length": before + T, "q_offset": before}
    return LazyMask({**arguments, "allow_is_causal_skip": True, "device": "cpu"})


class Still:
    """A rotation that turns nothing."""

    pairs_halves = True

    def tiles(self, k, start, columns, order):
        return k

    def __call__(self, k, start, columns):
        return k


def feed(store, q, k, v, steps, fold=None):
    """Outputs [B, Hq, T, D] of all steps."""
    outs, done = [], 0
    for size in steps:
        span = slice(done, done + size)
        store.append(k[:, :, span], v[:, :, span])
        some = (q[:, :, span], k[:, :, span], v[:, :, span])
        out, mass = attend_kept(*some, store, causal(store, size), Still(), Scores(0.3))
        store.settle(mass, fold)
        outs.append(out.transpose(1, 2))
        done += size
    return torch.cat(outs, 2)


def tensors(T, batch=1):
    return torch.randn(batch, 4, T, 16), torch.randn(batch, 2, T, 16), torch.randn(batch, 2, T, 16)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("steps", [(1,) * 90, (60,) + (1,) * 30, (7, 30, 1, 2, 50), (5,) * 18])
def test_each_policy_is_its_formula(name, steps):
    policy = POLICIES[name]
    q, k, v = tensors(90)
    store, spec = make(policy)
    folded = []
    got = feed(store, q, k, v, steps, lambda gone: folded.append(gone.columns))
    slots = slot_tokens(spec.codec, policy.budget)
    want, heads = simulate(
        *(x[0].double() for x in (q, k, v)), rules(policy), 2, 40 - 2 - slots, slots, 4, steps, 0.3
    )
    # Float32 softmax over at most 90 logits of size 5.
    torch.testing.assert_close(got[0].double(), want, rtol=0, atol=1e-5)
    for h, head in enumerate(heads):
        kept = store.kept().columns[0, h].tolist()
        gone = [i for c in folded for i in c[0, h].tolist() if i >= 0]
        assert sorted(kept) == sorted(head.sinks + head.middle + head.recent)
        assert sorted(gone) == sorted(head.folded)
        assert sorted(kept + gone) == list(range(90))  # each token once, kept or gone


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("codec", ["identity", "shared", "groups", "channels"])
def test_memory_is_that_of_the_budget(name, codec):
    """After the prefill and at every step: what was evicted is freed."""
    part = {
        "identity": IDENTITY,
        "shared": TensorCodec(NUQ(bits=4, table="nf"), TopK(0.1)),
        "groups": TensorCodec(Uniform(bits=3, group_size=8)),
        "channels": TensorCodec(Uniform(bits=4, axis="channel", group_size=4)),
    }[codec]
    store, spec = make(POLICIES[name], part)
    q, k, v = tensors(120, batch=2)
    want = cache_bytes(spec, GEOMETRY, 2, 120, torch.float32, position_rows=0).total
    for span in (slice(0, 100), *(slice(t, t + 1) for t in range(100, 120))):
        some = (q[:, :, span], k[:, :, span], v[:, :, span])
        feed(store, *some, (some[0].shape[2],))
        assert sum(t.nbytes for _, t in store.tensors()) == want
        held = store.kept().columns
        assert held.shape[2] <= 40 - 1 and int((held >= 0).sum()) <= 2 * 2 * 39


CODECS = {
    "identity": (IDENTITY, {}),
    "token": (TensorCodec(Uniform(bits=4)), {}),
    "nf": (TensorCodec(NUQ(bits=3, table="nf")), {}),
    "groups": (TensorCodec(Uniform(bits=4, group_size=8)), {}),
    "calibrated": (
        TensorCodec(NUQ(bits=4, axis="channel", range="calibrated", table="nf")),
        {"scale": 3 * torch.ones(2, 16), "zero": torch.full((2, 16), 0.1)},
    ),
}
DRIFTING = {
    "corrections": (TensorCodec(NUQ(bits=4, table="nf"), TopK(0.1)), {}, 1.05),
    "thresholds": (
        TensorCodec(
            NUQ(bits=4, axis="channel", range="calibrated", table="nf"), StaticThreshold(0.05)
        ),
        {"scale": torch.ones(2, 16), "zero": torch.zeros(2, 16)},
        1.1,
    ),
    "channel groups": (TensorCodec(Uniform(bits=4, axis="channel", group_size=4)), {}, 4.0),
}


def stored_error(codec, own):
    """Mean error of slots that were encoded once, and of those beside which 30 blocks changed."""
    parameters = {f"layers.0.{side}.{n}": t for side in "kv" for n, t in own.items()}
    torch.manual_seed(3)
    q, k, v = tensors(160)
    k[:, :, :24] *= 3.0  # heavy: they stay
    store, _ = make(H2O(40, recent=0), codec, parameters=parameters)
    feed(store, q * 0 + k.repeat_interleave(2, 1)[:, :, 8:9], k, v, (40,))
    first = store.slots.read()
    exact = k.gather(2, first.columns[..., None].expand(-1, -1, -1, 16))
    once = {
        (h, int(c)): (first.k[0, h, i] - exact[0, h, i]).abs().mean()
        for h in range(2)
        for i, c in enumerate(first.columns[0, h])
    }
    feed(store, (q * 0 + k.repeat_interleave(2, 1)[:, :, 8:9])[:, :, 40:], k[:, :, 40:],
         v[:, :, 40:], (4,) * 30)  # fmt: skip
    last = store.slots.read()
    pairs = [
        (once[h, int(c)], (last.k[0, h, i] - k[0, h, int(c)]).abs().mean())
        for h in range(2)
        for i, c in enumerate(last.columns[0, h])
        if (h, int(c)) in once
    ]
    assert len(pairs) >= 8
    return [float(torch.stack(p).mean()) for p in zip(*pairs, strict=True)]


@pytest.mark.parametrize("name", CODECS)
def test_tokens_that_stay_keep_their_values(name):
    once, often = stored_error(*CODECS[name])
    # Ranges come out the same but for one rounding of their float16 ends.
    assert often == pytest.approx(once, abs=1e-3)


@pytest.mark.parametrize("name", DRIFTING)
def test_codecs_that_drift_do_so_within_bounds(name):
    codec, own, factor = DRIFTING[name]
    once, often = stored_error(codec, own)
    assert often <= factor * once


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_are_attended_to_where_they_lie(name, monkeypatch):
    """Slots in tile order give what they give in natural order, and nothing joins the tokens."""

    class Natural(Still):
        pairs_halves = False

    found, q, k, v = [], *tensors(100)
    nf = TensorCodec(NUQ(bits=4, table="nf"))
    for rotate in (Still(), Natural()):
        store, _ = make(POLICIES[name], nf)
        feed(store, q, k, v, (90,))
        outs = []
        for t in range(90, 100):
            some = [x[:, :, t : t + 1] for x in (q, k, v)]
            store.append(*some[1:])
            with monkeypatch.context() as patch:
                patch.setattr(Tokens, "join", None)
                out, mass = attend_kept(*some, store, causal(store, 1), rotate, Scores(0.3))
            if mass is not None:  # two queries a KV head spread 1 each
                torch.testing.assert_close(mass.sum(-1), torch.full((1, 2), 2.0))
            store.settle(mass)
            outs.append(out)
        found.append(torch.cat(outs))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_rows_are_selected_and_repeated():
    q, k, v = tensors(60, batch=3)
    order = torch.tensor([2, 0, 0, 1])
    for codec in (IDENTITY, TensorCodec(Uniform(bits=4))):
        store, _ = make(H2O(40, recent=8), codec)
        feed(store, q, k, v, (50,) + (1,) * 10)
        want = store.kept()
        store.map_rows(lambda t: t.index_select(0, order))
        got = store.kept()
        assert torch.equal(got.k, want.k[order]) and torch.equal(got.columns, want.columns[order])
        assert store.scores.shape[0] == 4


def test_what_cannot_be_taken_back_is_refused():
    q, k, v = tensors(60)
    for policy in (H2O(40, recent=8), TOVA(40)):
        store, _ = make(policy)
        feed(store, q, k, v, (60,))
        message = rf"cache\.crop: length under eviction {policy.kind} must be at least 60, got 58"
        with pytest.raises(ValueError, match=message):
            store.crop(58)
    store, _ = make(Lambda(40))
    feed(store, q, k, v, (60,))
    store.crop(57)  # still in the recent window
    got = feed(store, q[:, :, 57:], k[:, :, 57:], v[:, :, 57:], (3,))
    assert store.length == 60 and got.isfinite().all()
    with pytest.raises(ValueError, match="must be at least"):
        store.crop(30)
    store.crop(0)
    assert store.batch_size == 0 and not list(store.tensors())


def test_the_mass_of_a_step_is_that_of_its_parts():
    """H2O in one step or in many counts the same attention while nothing is evicted."""
    q, k, v = tensors(30)
    one, _ = make(H2O(40, recent=8))
    many, _ = make(H2O(40, recent=8))
    feed(one, q, k, v, (30,))
    feed(many, q, k, v, (1,) * 30)
    end = one.count + 30 - one.start
    assert one.start == many.start
    for part in (slice(0, one.slots.used), slice(one.count, end)):
        torch.testing.assert_close(one.scores[..., part], many.scores[..., part])
