"""encode_pack and decode against an independent derivation of the published methods."""

import numpy as np
import pytest
import torch

from kvsmith.codec import Codec, normal_levels, uniform_levels
from kvsmith.kernels.encode_pack.reference import split_extremes
from kvsmith.kernels.pack.api import unpack
from kvsmith.spec import NUQ, Identity, StaticThreshold, TensorCodec, TopK, Uniform
from tests.oracles import kvquant as oracle

HEADS, DIM = 4, 32


def _sample(tokens=208, batch=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, HEADS, tokens, DIM, generator=generator)
    x = x * torch.rand(1, HEADS, 1, DIM, generator=generator).mul(3).exp() + x.sign()
    return x + 0.3 * torch.randn(x.shape, generator=generator) ** 3


def _rows(x):
    """[1, H, T, D] -> [T, H * D] float64 numpy."""
    return x[0].transpose(0, 1).reshape(x.shape[2], -1).double().numpy()


def _corrected(codec, tensors):
    """Which elements have a correction, [B, T, H * D] bool."""
    zeros = torch.zeros_like(tensors["value"])
    without = codec.decode(tensors | {"value": zeros})
    changed = codec.decode(tensors | {"value": zeros + 1}) != without
    return changed.transpose(1, 2).flatten(2)


def _codes(codec, tensors):
    codes = unpack(tensors["codes"], codec.format.bits, DIM)
    return codes[0].transpose(0, 1).reshape(codes.shape[2], -1).numpy()


def _settled(normal, lut):
    """Where float32 cannot change the code: not within its rounding of a boundary."""
    distance = np.abs(normal[..., None] - (lut[1:] + lut[:-1]) / 2).min(-1)
    return distance > 1e-6 * np.maximum(np.abs(normal), 1)


def _close(got, want, where):
    """1e-6 of the tensor's largest element: float32 against float64."""
    assert np.abs(got - want)[where].max() <= 1e-6 * np.abs(want).max()


def _lut(bits, seed=0):
    lut = torch.rand(2**bits, generator=torch.Generator().manual_seed(seed)).mul(1.9).sub(0.95)
    return lut.sort().values


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.05])
def test_keys_equal_the_oracle(bits, fraction):
    x, lut = _sample(), _lut(bits)
    lower, upper = oracle.channel_range(_rows(_sample(seed=5)), fraction)
    scale, zero = oracle.affine(lower, upper)
    spec = TensorCodec(
        NUQ(bits=bits, axis="channel", range="calibrated"),
        StaticThreshold(fraction) if fraction else None,
    )
    parameters = {
        "lut": lut,
        "edges": (lut[1:] + lut[:-1]) / 2,
        "scale": torch.tensor(scale).float().view(HEADS, DIM),
        "zero": torch.tensor(zero).float().view(HEADS, DIM),
    }
    codec = Codec(spec, HEADS, DIM, torch.float32, parameters, "k")
    tensors = codec.encode(x)
    scale32, zero32 = (parameters[n].double().numpy().reshape(-1) for n in ("scale", "zero"))
    normal = (_rows(x) - zero32) / scale32
    levels = lut.double().numpy()
    settled = _settled(normal, levels)
    assert settled.mean() > 0.999
    assert np.array_equal(_codes(codec, tensors)[settled], oracle.nearest(normal, levels)[settled])
    slots = round(fraction * HEADS * DIM)
    keep = np.zeros_like(normal, dtype=bool)
    for t, row in enumerate(np.abs(normal)):
        far = np.argsort(-row)[:slots]
        keep[t, far[row[far] > 1]] = True
    want = oracle.reconstruct(_rows(x), scale32, zero32, levels, keep)
    _close(_rows(codec.decode(tensors)), want, settled)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.02, 0.1])
def test_values_equal_the_oracle(bits, fraction):
    x, lut = _sample(), _lut(bits)
    spec = TensorCodec(NUQ(bits=bits), TopK(fraction) if fraction else None)
    edges = (lut[1:] + lut[:-1]) / 2
    codec = Codec(spec, HEADS, DIM, torch.float32, {"lut": lut, "edges": edges}, "v")
    tensors = codec.encode(x)
    rows, slots = _rows(x), round(fraction * HEADS * DIM)
    mask = oracle.token_outliers(rows, slots)
    assert (mask.sum(1) == slots).all()
    if slots:
        assert np.array_equal(_corrected(codec, tensors)[0].numpy(), mask)
    scale, zero = (tensors[n][0].double().numpy()[:, None] for n in ("scale", "zero"))
    want_scale, want_zero = oracle.affine(*oracle.token_range(rows, mask))
    np.testing.assert_allclose(scale[:, 0], want_scale, rtol=1e-6)
    np.testing.assert_allclose(zero[:, 0], want_zero, rtol=1e-6, atol=1e-6)
    normal = (rows - zero) / scale
    codes = _codes(codec, tensors)
    levels = lut.double().numpy()
    settled = _settled(normal, levels)
    sure = settled & ~mask
    assert settled.mean() > 0.999
    assert np.array_equal(codes[sure], oracle.nearest(normal, levels)[sure])
    want = oracle.reconstruct(rows, scale, zero, levels, mask)
    _close(_rows(codec.decode(tensors)), want, settled | mask)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_uniform_groups_equal_kivi(bits):
    """KIVI s3, arXiv:2402.02750: keys per channel over tokens, values per token over channels."""
    x, group = _sample(tokens=64), 16
    levels = 2**bits - 1
    for spec, axis in (
        (Uniform(bits=bits, axis="channel", group_size=group), 2),
        (Uniform(bits=bits, axis="token", group_size=group), 3),
    ):
        codec = Codec(TensorCodec(spec), HEADS, DIM, torch.float32, {}, "k")
        got = codec.decode(codec.encode(x)).double()
        parts = x.double().unflatten(axis, (-1, group))
        low, high = parts.amin(axis + 1, True), parts.amax(axis + 1, True)
        step = (high - low) / levels
        want = (((parts - low) / step).round() * step + low).flatten(axis, axis + 1)
        # Exactly half-way values may round either way: one step there, rounding elsewhere.
        off = (got - want).abs()
        assert (off > 1e-4).float().mean() < 1e-3
        assert (off <= step.expand(parts.shape).flatten(axis, axis + 1) + 1e-4).all()


@pytest.mark.parametrize("value", [0.0, 3.0, -1e30])
def test_constant_tokens_come_back(value):
    x = torch.full((1, HEADS, 16, DIM), value)
    for spec in (TensorCodec(Uniform(bits=2)), TensorCodec(NUQ(bits=3, table="nf"), TopK(0.05))):
        codec = Codec(spec, HEADS, DIM, torch.float32, {}, "v")
        torch.testing.assert_close(codec.decode(codec.encode(x)), x)


def test_outlier_indices_are_distinct_under_ties():
    for tokens in (torch.zeros(3, 64), torch.randint(-1, 2, (50, 64)).float()):
        for slots in (1, 2, 5, 32):
            _, _, index = split_extremes(tokens, slots)
            assert all(len(set(row)) == slots for row in index.tolist())


def test_float16_store_clamps_instead_of_overflowing():
    x = torch.randn(1, HEADS, 16, DIM)
    x[0, 0, 3, 5], x[0, 1, 4, 6] = 3e5, -3e5
    codec = Codec(
        TensorCodec(NUQ(bits=4, table="nf"), TopK(0.01)), HEADS, DIM, torch.float16, {}, "v"
    )
    assert codec.decode(codec.encode(x)).isfinite().all()


def test_wide_tensors_use_sixteen_bit_indices():
    x = torch.randn(1, 32, 16, 128) ** 3
    codec = Codec(TensorCodec(NUQ(bits=4, table="nf"), TopK(0.01)), 32, 128, torch.float32, {}, "v")
    tensors = codec.encode(x)
    assert tensors["index"].dtype == torch.int16 and tensors["index"].shape == (1, 1, 16 * 41)
    back, flat = codec.decode(tensors), x.transpose(1, 2).flatten(2)
    top = flat.abs().topk(20).indices
    exact = _corrected(codec, tensors)
    assert exact.sum() == 16 * 41 and exact.gather(-1, top).all()
    torch.testing.assert_close(back.transpose(1, 2).flatten(2)[exact], flat[exact])


def test_tables():
    assert uniform_levels(2).tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1])
    levels = normal_levels(4)
    assert levels[0] == -1 and levels[-1] == 1
    torch.testing.assert_close(levels, -levels.flip(0))


def test_missing_and_misshapen_parameters_are_named():
    spec = TensorCodec(NUQ(bits=2))
    with pytest.raises(ValueError, match=r"layers\.3\.v\.lut: parameter must be present"):
        Codec(spec, HEADS, DIM, torch.float16, {}, "layers.3.v")
    bad = {"lut": torch.zeros(3), "edges": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"layers\.3\.v\.lut: shape must be \(4,\), got \(3,\)"):
        Codec(spec, HEADS, DIM, torch.float16, bad, "layers.3.v")
    assert Codec(TensorCodec(Identity()), HEADS, DIM, torch.float16, {}, "k").is_identity


def test_slots_for_the_largest_errors_beat_slots_beyond_the_range():
    """Every slot is in use, on the elements of each token that are coded worst."""
    x, errors = _sample(), {}
    lower, upper = oracle.channel_range(_rows(x), 0.01)
    scale, zero = (torch.tensor(t).float().view(HEADS, DIM) for t in oracle.affine(lower, upper))
    for select in ("beyond_range", "largest_error"):
        spec = TensorCodec(
            Uniform(bits=3, axis="channel", range="calibrated"),
            StaticThreshold(0.03, select=select),
        )
        codec = Codec(spec, HEADS, DIM, torch.float32, {"scale": scale, "zero": zero}, "k")
        tensors = codec.encode(x)
        errors[select] = _rows(codec.decode(tensors)) - _rows(x)
        used = (tensors["value"] != 0).float().mean()
        assert used == 1 if select == "largest_error" else used < 0.9
    assert (errors["largest_error"] ** 2).mean() < (errors["beyond_range"] ** 2).mean()
    # What is left is below what was corrected.
    spec = TensorCodec(Uniform(bits=3, axis="channel", range="calibrated"))
    codec = Codec(spec, HEADS, DIM, torch.float32, {"scale": scale, "zero": zero}, "k")
    plain = np.abs(_rows(codec.decode(codec.encode(x))) - _rows(x))
    slots = round(0.03 * HEADS * DIM)
    next_worst = np.sort(plain, axis=1)[:, -slots - 1]
    assert (np.abs(errors["largest_error"]).max(1) <= next_worst + 1e-5).all()
