"""low_rank and the codecs around it against an independent derivation of GEAR."""

import numpy as np
import pytest
import torch

from kvsmith.codec import Codec
from kvsmith.kernels.attend.api import attend
from kvsmith.kernels.format import Factors
from kvsmith.kernels.low_rank.api import add_low_rank, fit_low_rank, read_factors
from kvsmith.kernels.low_rank.reference import _start
from kvsmith.spec import NUQ, LowRank, TensorCodec, TopK, Uniform
from tests.oracles import gear as oracle

H, T, D, BLOCK = 2, 128, 32, 64


def sample(seed=0, tokens=T):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, H, tokens, D, generator=generator)
    return x * torch.rand(1, H, 1, D, generator=generator).mul(3).exp() + 0.2 * x**3


def product(tensors, fmt):
    left, right = read_factors(tensors, fmt, D)
    x = torch.zeros(left.shape[0], H, left.shape[2] * fmt.block, D)
    return add_low_rank(x, left, right)


BACKBONES = {
    # codec, its oracle, elements of a range
    "kivi keys": (Uniform(axis="channel", group_size=16), oracle.keys, 16),
    "kivi values": (Uniform(group_size=16), oracle.values, 16),
    "kcvt keys": (Uniform(axis="channel", group_size=BLOCK), oracle.keys, BLOCK),
    "kcvt values": (Uniform(), oracle.values, H * D),
}
SHARE = 1 / 32  # of 64 elements: one at either end of a channel, and of a token


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("parts", ["gear", "gear-l", "outliers"])
@pytest.mark.parametrize("name", BACKBONES)
def test_equals_the_oracle(name, parts, bits):
    q, derive, group = BACKBONES[name]
    sparse, rank = parts != "gear-l", 0 if parts == "outliers" else 3
    spec = TensorCodec(
        Uniform(bits=bits, axis=q.axis, group_size=q.group_size),
        TopK(SHARE) if sparse else None,
        LowRank(rank, iterations=3) if rank else None,
    )
    x = sample(6)
    codec = Codec(spec, H, D, torch.float32, {}, name, BLOCK)
    got = codec.decode(codec.encode(x))[0].double().numpy()
    for start in range(0, T, BLOCK):
        block = x[0, :, start : start + BLOCK].double().numpy()
        want, nearest = derive(block, int(sparse), group, bits)
        # An element this close to the middle between two levels may take either in float32.
        assert nearest > 2e-6
        if rank:
            first = _start(D, rank, x.device).double().numpy().T
            left = [oracle.power_iteration(e, first, 3) for e in block - want]
            want = want + np.stack(left)
        # float32 against float64, through three iterations of sums over 64 terms.
        error = np.abs(got[:, start : start + BLOCK] - want).max()
        assert error <= 1e-5 * np.abs(block).max()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_part_takes_its_share_of_the_error(name, bits):
    q = BACKBONES[name][0]
    x, errors = sample(), {}
    for outliers in (None, TopK(SHARE)):
        for low_rank in (None, LowRank(2), LowRank(6)):
            spec = TensorCodec(Uniform(bits, q.axis, q.group_size), outliers, low_rank)
            codec = Codec(spec, H, D, torch.float16, {}, name, BLOCK)
            off = (codec.decode(codec.encode(x)) - x).norm()
            errors[outliers is not None, low_rank.rank if low_rank else 0] = float(off)
    for sparse in (False, True):
        assert errors[sparse, 6] < errors[sparse, 2] < errors[sparse, 0]
    assert all(errors[True, r] < errors[False, r] for r in (0, 2, 6))


@pytest.mark.parametrize("rank", [1, 4, 32])
def test_close_to_the_best_of_its_rank(rank):
    error = sample(3, BLOCK)
    fmt = Factors(BLOCK, 3, 0, torch.float32)
    got = product(fit_low_rank(error, fmt, rank), fmt)
    for head in range(H):
        e = error[0, head].double().numpy()
        least = np.linalg.norm(e - oracle.best(e, rank))
        off = np.linalg.norm(e - got[0, head].double().numpy())
        # Three iterations come within a few percent; the full rank within rounding.
        assert off <= 1.05 * least + 1e-5 * np.linalg.norm(e)


def test_extremes_are_an_exact_share_whatever_the_length():
    """Three of a channel's 64 tokens, and of a token's 64 elements, at any length."""
    for q in (Uniform(2, "channel", 16), Uniform(2, "token", 8)):
        for tokens in (64, 192, 640):
            codec = Codec(TensorCodec(q, TopK(0.05)), H, D, torch.float16, {}, "k", BLOCK)
            tensors = codec.encode(sample(1, tokens))
            assert tensors["index"].shape == (1, tokens // BLOCK, BLOCK * 3)
            zeros = tensors | {"value": torch.zeros_like(tensors["value"])}
            ones = tensors | {"value": torch.ones_like(tensors["value"])}
            changed = (codec.decode(ones) != codec.decode(zeros)).unflatten(2, (-1, BLOCK))
            counts = changed.sum(3) if q.axis == "channel" else changed.sum((1, 4))
            assert (counts == 3).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantized_factors(bits):
    error = sample(2)
    exact, few = Factors(BLOCK, 3, 0, torch.float32), Factors(BLOCK, 3, bits, torch.float32)
    whole = product(fit_low_rank(error, exact, 4), exact)
    tensors = fit_low_rank(error, few, 4)
    got = product(tensors, few)
    assert tensors["left"].dtype == torch.uint8
    assert tensors["left"].shape == (1, H, 2, 4, BLOCK * bits // 8)
    assert tensors["right"].shape == (1, H, 2, 4, D * bits // 8)
    off, least = (error - got).norm(), (error - whole).norm()
    # A factor is off by max sqrt(n / 3) 2^-bits of its own norm: max is at most 4 deviations on the
    # left, and at most 1 on the right, where one channel may hold all of it.
    off_by = 2.0**-bits * whole.norm() * ((16 / 3) + D / 3) ** 0.5
    assert least < off < (least**2 + off_by**2).sqrt()
    assert off < error.norm()


def test_nothing_left_gives_nothing():
    for bits in (0, 4):
        fmt = Factors(BLOCK, 3, bits, torch.float16)
        assert product(fit_low_rank(torch.zeros(2, H, T, D), fmt, 3), fmt).abs().max() == 0


def test_same_bytes_every_time_and_no_random_state_touched():
    before = torch.get_rng_state()
    codec = Codec(TensorCodec(Uniform(2), TopK(0.05), LowRank(3)), H, D, torch.float16, {}, "k", 64)
    one, two = codec.encode(sample()), codec.encode(sample())
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert torch.equal(torch.get_rng_state(), before)
    rows = codec.encode(torch.cat([sample(4), sample()]))
    for name in ("left", "right"):  # a row does not know its neighbours
        torch.testing.assert_close(rows[name][1:], one[name], rtol=2e-3, atol=2e-3)


def test_low_rank_over_a_codebook():
    x = sample()
    plain, corrected = (
        Codec(
            TensorCodec(NUQ(3, table="nf"), TopK(0.05), low_rank), H, D, torch.float16, {}, "v", 64
        )
        for low_rank in (None, LowRank(4))
    )
    first, second = (float((c.decode(c.encode(x)) - x).norm()) for c in (plain, corrected))
    assert second < first


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tile_order_is_an_order_alone(bits):
    codec = Codec(
        TensorCodec(Uniform(bits, "channel", 16), TopK(0.05), LowRank(3, bits=4)),
        H, D, torch.float16, {}, "k", 64,
    )  # fmt: skip
    tensors = codec.encode(sample())
    got, want = codec.decode_tiles(tensors), codec.decode(tensors)[..., codec.tile_order]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("bits", [None, 4])
def test_what_is_not_finite_is_refused(bad, bits):
    x = sample()
    x[0, 1, 70, 5] = bad
    with pytest.raises(ValueError, match="keys and values must be finite, got NaN or infinity"):
        fit_low_rank(x, Factors(64, 3, bits or 0, torch.float16), 2)


def test_ranks_and_lengths_that_do_not_fit_are_refused():
    fmt = Factors(BLOCK, 3, 0, torch.float16)
    with pytest.raises(ValueError, match="rank must be between 1 and 32, got 33"):
        fit_low_rank(sample(), fmt, 33)
    with pytest.raises(ValueError, match="tokens must be a multiple of block = 64, got 100"):
        fit_low_rank(sample(tokens=100), fmt, 2)


@pytest.mark.parametrize("tokens", [T, 100])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_factors_attend_as_their_product_would(tokens, softcap):
    """Apart, by linearity, and added to keys and values: the same but for rounding."""
    generator = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, 3, H, T, D, generator=generator).unbind(0)
    q = torch.randn(3, 4 * H, 5, D, generator=generator)
    mask = torch.rand(3, 1, 5, tokens, generator=generator) > 0.3
    fmt = Factors(BLOCK, 3, 0, torch.float32)
    lows = [read_factors(fit_low_rank(x, fmt, 3), fmt, D) for x in (k, v)]
    dense = [
        add_low_rank(x.clone(), *low)[:, :, :tokens] for x, low in zip((k, v), lows, strict=True)
    ]
    how = {"scale": 0.3, "mask": mask, "softcap": softcap}
    want = attend(q, *dense, **how)
    short = (k[:, :, :tokens], v[:, :, :tokens])
    got = attend(q, *short, **how, k_low=lows[0], v_low=lows[1])
    # float32 sums of 32 and of 128 terms of unit size, in another order.
    torch.testing.assert_close(got.out, want.out, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-5, atol=1e-4)
    assert float((attend(q, *short, **how).out - want.out).abs().max()) > 0.1
