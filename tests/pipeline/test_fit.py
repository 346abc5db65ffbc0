"""The fit: k-means against scikit-learn; thresholds, codes, reconstruction against the oracle."""

from __future__ import annotations

from math import nextafter

import numpy as np
import pytest
import torch
from torch import Tensor

from kvsmith.codec import Codec
from kvsmith.geometry import LayerGeometry
from kvsmith.layout import parameter_tensors
from kvsmith.pipeline.fit import Sensitivity, fit_codebook, fit_codec, histogram_for, objective
from kvsmith.pipeline.fit.codec import normalised_rmse
from kvsmith.pipeline.statistics import LayerStatistics, plan_for
from kvsmith.spec import NUQ, CodecSpec, Identity, StaticThreshold, TensorCodec, TopK, Uniform
from tests.oracles import kvquant as oracle

H, D, N = 2, 32, 2000
LAYER = LayerGeometry(kv_heads=H, query_heads=4, k_dim=D, v_dim=D)


def codec(bits: int, fraction: float, q_norm: bool = False) -> CodecSpec:
    return CodecSpec(
        k=TensorCodec(
            NUQ(bits=bits, axis="channel", range="calibrated", q_norm=q_norm),
            StaticThreshold(fraction=fraction) if fraction else None,
        ),
        v=TensorCodec(NUQ(bits=bits, q_norm=q_norm), TopK(fraction=fraction) if fraction else None),
    )


def activations(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and squared gradients [N, H, D]: heavy tails, a few wide channels, a few loud tokens."""
    generator = np.random.default_rng(seed)
    x = generator.standard_t(5, (N, H, D)) * generator.lognormal(0, 0.7, (H, D))
    x = x + generator.normal(0, 2, (H, D))
    fisher = generator.lognormal(0, 1, (N, 1, 1)) * generator.normal(0, 1e-4, (N, H, D)) ** 2
    return torch.from_numpy(x).float(), torch.from_numpy(fisher).float()


def statistics(*codecs: CodecSpec, fisher: bool = True) -> tuple[LayerStatistics, Tensor, Tensor]:
    plan = plan_for(codecs, N, max_fraction=0.1, fractions=(0.0,), fisher=fisher)
    stats = LayerStatistics(plan, LAYER)
    x, weights = activations()
    for part, w in zip(x.split(300), weights.split(300), strict=True):
        for name in ("k", "v"):
            stats.update(name, part, w if fisher else None)
    return stats, x, weights


def samples(kind: str, n: int) -> np.ndarray:
    generator = np.random.default_rng(1)
    made = {
        "normal": lambda: generator.normal(size=n),
        "student": lambda: generator.standard_t(2, n),
        "cauchy": lambda: generator.standard_cauchy(n),
        "clusters": lambda: generator.integers(0, 16, n) + 0.01 * generator.normal(size=n),
        "uniform": lambda: generator.uniform(-1, 1, n),
        "far off": lambda: 1000 + generator.normal(size=n),
        "few": lambda: generator.integers(0, 40, n) ** 2,
    }
    return made[kind]().astype(np.float32)


@pytest.mark.parametrize("n", [300, 5000, 80_000])  # above 65536 values are binned
@pytest.mark.parametrize(
    "kind", ["normal", "student", "cauchy", "clusters", "uniform", "far off", "few"]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_objective_is_no_worse_than_scikit_learns(kind: str, n: int, weighted: bool) -> None:
    values = samples(kind, n)
    weights = np.random.default_rng(2).lognormal(0, 2, n).astype(np.float32) if weighted else None
    held = None if weights is None else torch.from_numpy(weights)
    for k in (4, 8, 16):
        ours = fit_codebook(torch.from_numpy(values), held, k)
        assert ours.shape == (k,) and bool((ours.diff() > 0).all())
        cost = oracle.distortion(values, weights, ours.double().numpy())
        reference = oracle.distortion(values, weights, oracle.kmeans(values, weights, k))
        # Both often end in the same optimum, where they differ by how they round: 1e-5 of the cost.
        assert cost <= reference * (1 + 1e-5), (k, cost / reference)


def test_the_best_partition_is_found_where_all_can_be_tried() -> None:
    values = np.random.default_rng(3).standard_t(2, 9)
    values.sort()
    cuts = [(a, b) for a in range(1, 8) for b in range(a + 1, 9)]
    best = min(
        sum(((part - part.mean()) ** 2).sum() for part in np.split(values, cut)) for cut in cuts
    )
    levels = fit_codebook(torch.from_numpy(values), None, 3)
    assert objective(torch.from_numpy(values), None, levels) * 9 == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(
    "values", [[0.5], [2.0, 2.0, 2.0], [0.0, 1.0, 0.0], [1.0, nextafter(1.0, 2.0)], [1e30, -1e30]]
)
def test_fewer_values_than_levels_still_give_increasing_levels(values: list[float]) -> None:
    levels = fit_codebook(torch.tensor(values), None, 8)
    assert levels.shape == (8,) and bool((levels.diff() > 0).all())
    assert objective(torch.tensor(values), None, levels) == 0


def test_values_without_weight_do_not_count() -> None:
    values = torch.tensor([0.0, 1.0, 5.0, 100.0])
    levels = fit_codebook(values, torch.tensor([1.0, 1.0, 1.0, 0.0]), 3)
    assert levels.tolist() == [0.0, 1.0, 5.0]


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ([], None, "at least one, got none"),
        ([1.0, float("nan")], None, "finite, got NaN"),
        ([1.0], [-1.0], "none negative and some positive"),
        ([1.0, 2.0], [0.0, 0.0], "none negative and some positive"),
    ],
)
def test_bad_samples_are_refused(values: list[float], weights: list[float], message: str) -> None:
    held = None if weights is None else torch.tensor(weights)
    with pytest.raises(ValueError, match=message):
        fit_codebook(torch.tensor(values), held, 4)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_key_thresholds_codes_and_reconstruction_equal_the_oracle(
    bits: int, fraction: float
) -> None:
    spec = codec(bits, fraction)
    stats, x, _ = statistics(spec)
    fitted = fit_codec(stats, spec)
    flat = x.flatten(1).numpy()
    lower, upper = oracle.channel_range(flat, fraction)
    scale, zero = oracle.affine(lower, upper)
    np.testing.assert_allclose(fitted["k.scale"].flatten().numpy(), scale, rtol=1e-6)
    np.testing.assert_allclose(fitted["k.zero"].flatten().numpy(), zero, rtol=1e-6, atol=1e-6)

    # The cache keeps N outliers a token; the published threshold has no such limit. Compare tokens
    # within it.
    normal = (flat - zero) / scale
    outlier = np.abs(normal) > 1
    own = {key.removeprefix("k."): t for key, t in fitted.items() if key.startswith("k.")}
    coder = Codec(spec.k, H, D, torch.float32, own, "k")
    got = coder.decode(coder.encode(x.transpose(0, 1)[None]))[0].transpose(0, 1).flatten(1).numpy()
    within = outlier.sum(1) <= round(fraction * H * D)
    assert within.mean() > 0.5
    centroids = fitted["k.lut"].double().numpy()
    expected = oracle.reconstruct(flat, scale, zero, centroids, outlier)
    # A value within float32 rounding of a boundary may fall on its other side.
    edges = fitted["k.edges"].double().numpy()
    clear = np.abs(normal[..., None] - edges).min(-1) > 1e-6
    clear &= np.abs(np.abs(normal) - 1) > 1e-6
    assert clear.mean() > 0.998  # two values of each channel are its thresholds
    mask = clear & within[:, None]
    np.testing.assert_allclose(got[mask], expected[mask], rtol=1e-6, atol=1e-6 * np.abs(flat).max())


@pytest.mark.parametrize("fraction", [0.0, 0.05])
def test_value_codes_and_reconstruction_equal_the_oracle(fraction: float) -> None:
    spec = codec(3, fraction)
    stats, x, _ = statistics(spec)
    fitted = fit_codec(stats, spec)
    flat = x.flatten(1).double().numpy()
    mask = oracle.token_outliers(flat, round(fraction * H * D))
    scale, zero = (t[:, None] for t in oracle.affine(*oracle.token_range(flat, mask)))
    own = {key.removeprefix("v."): t for key, t in fitted.items() if key.startswith("v.")}
    coder = Codec(spec.v, H, D, torch.float32, own, "v")
    got = coder.decode(coder.encode(x.transpose(0, 1)[None]))[0].transpose(0, 1).flatten(1).numpy()
    expected = oracle.reconstruct(flat, scale, zero, fitted["v.lut"].double().numpy(), mask)
    normal = (flat - zero) / scale
    clear = np.abs(normal[..., None] - fitted["v.edges"].double().numpy()).min(-1) > 1e-6
    np.testing.assert_allclose(
        got[clear], expected[clear], rtol=1e-6, atol=1e-6 * np.abs(flat).max()
    )


@pytest.mark.parametrize("sensitivity", ["fisher", "fisher_scale", "none"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("fraction", [0.0, 0.02])
def test_codebooks_are_as_good_as_from_the_raw_sample(
    sensitivity: Sensitivity, bits: int, fraction: float
) -> None:
    spec = codec(bits, fraction)
    stats, x, fisher = statistics(spec)
    fitted = fit_codec(stats, spec, sensitivity)
    flat, weight = x.flatten(1).double().numpy(), fisher.flatten(1).double().numpy()
    channel = oracle.affine(*oracle.channel_range(flat, fraction))
    mask = oracle.token_outliers(flat, round(fraction * H * D))
    token = tuple(t[:, None] for t in oracle.affine(*oracle.token_range(flat, mask)))
    for name, (scale, zero) in (("k", channel), ("v", token)):
        normal = (flat - zero) / scale
        held = np.abs(normal) <= 1 if name == "k" else ~mask
        power = {"fisher": weight, "fisher_scale": weight * scale**2, "none": np.ones_like(flat)}
        values, weights = normal[held], power[sensitivity][held]
        raw = fit_codebook(torch.from_numpy(values), torch.from_numpy(weights), 2**bits)
        costs = [
            oracle.distortion(values, weights, lut.double().numpy())
            for lut in (fitted[f"{name}.lut"], raw)
        ]
        assert costs[0] <= 1.01 * costs[1], (name, costs[0] / costs[1])


def test_q_norm_equals_the_oracle_on_the_raw_sample() -> None:
    plain, normed = codec(2, 0.05), codec(2, 0.05, q_norm=True)
    stats, x, _ = statistics(plain)
    before, after = fit_codec(stats, plain), fit_codec(stats, normed)
    assert torch.equal(before["k.edges"], after["k.edges"])
    flat = x.flatten(1).double().numpy()
    scale, zero = oracle.affine(*oracle.channel_range(flat, 0.05))
    normal = (flat - zero) / scale
    expected = oracle.q_norm(normal[np.abs(normal) <= 1], before["k.lut"].double().numpy())
    # the histogram's bins are about 1/150 of the range [-1, 1] wide here
    np.testing.assert_allclose(after["k.lut"].numpy(), expected, atol=2e-3)
    assert not torch.allclose(after["k.lut"], before["k.lut"], atol=1e-2)


def test_fit_gives_exactly_the_tensors_of_the_layout() -> None:
    mixed = [
        CodecSpec(k=TensorCodec(Identity()), v=TensorCodec(Uniform(bits=4))),
        CodecSpec(
            k=TensorCodec(
                Uniform(bits=2, axis="channel", range="calibrated"), StaticThreshold(fraction=0.01)
            ),
            v=TensorCodec(NUQ(bits=4, table="nf"), TopK(fraction=0.01)),
        ),
        CodecSpec(
            k=TensorCodec(NUQ(bits=2, group_size=16)),
            v=TensorCodec(NUQ(bits=2, axis="channel", range="calibrated")),
        ),
        codec(3, 0.02),
    ]
    stats, *_ = statistics(*mixed)
    for spec in mixed:
        expected = {
            f"{name}.{key}": info
            for name, part in (("k", spec.k), ("v", spec.v))
            for key, info in parameter_tensors(part, H, D).items()
        }
        fitted = fit_codec(stats, spec)
        assert list(fitted) == list(expected)
        for key, tensor in fitted.items():
            assert tuple(tensor.shape) == expected[key].shape and tensor.dtype == torch.float32
            assert bool(tensor.isfinite().all()) and (not key.endswith("scale") or tensor.min() > 0)


def test_a_constant_channel_keeps_its_value() -> None:
    spec = codec(2, 0.02)
    plan = plan_for([spec], N, max_fraction=0.02, fractions=(), fisher=False)
    stats = LayerStatistics(plan, LAYER)
    x, _ = activations()
    x[:, 0, 0], x[:, 1, 3] = 7.25, 0.0
    stats.update("k", x, None)
    stats.update("v", x, None)
    fitted = fit_codec(stats, spec, "none")
    own = {key.removeprefix("k."): t for key, t in fitted.items() if key.startswith("k.")}
    coder = Codec(spec.k, H, D, torch.float32, own, "k", block=8)
    got = coder.decode(coder.encode(x[:8].transpose(0, 1)[None]))[0]
    torch.testing.assert_close(got[0, :, 0], torch.full((8,), 7.25), rtol=1e-5, atol=0)
    assert got[1, :, 3].abs().max() < 1e-5


def test_normalised_error_is_what_coding_leaves() -> None:
    spec = codec(3, 0.02)
    stats, x, _ = statistics(spec)
    fitted = fit_codec(stats, spec)
    flat = x.flatten(1).double().numpy()
    scale, zero = oracle.affine(*oracle.channel_range(flat, 0.02))
    normal = (flat - zero) / scale
    inner = normal[np.abs(normal) <= 1]
    expected = oracle.distortion(inner, None, fitted["k.lut"].double().numpy()) ** 0.5
    assert normalised_rmse(stats, "k", spec.k, fitted) == pytest.approx(expected, rel=0.01)


def test_histogram_for_a_plot_is_a_distribution_over_the_normalised_range() -> None:
    spec = codec(3, 0.02)
    stats, x, _ = statistics(spec)
    flat = x.flatten(1).double().numpy()
    scale, zero = oracle.affine(*oracle.channel_range(flat, 0.02))
    inner = ((flat - zero) / scale)[np.abs((flat - zero) / scale) <= 1]
    centres, weights = histogram_for(stats, "k", 0.02)
    assert centres.shape == weights.shape == (2048,)
    assert float(weights.sum()) == pytest.approx(1) and float(centres.abs().max()) < 1
    below = float(weights[centres < -0.5].sum())
    assert below == pytest.approx((inner < -0.5).mean(), abs=5e-3)
    assert float(histogram_for(stats, "v", 0.02)[1].sum()) == pytest.approx(1)


def test_what_was_not_observed_is_named() -> None:
    stats, *_ = statistics(codec(3, 0.02), fisher=False)
    with pytest.raises(ValueError, match="sensitivity: value must be none .* got fisher"):
        fit_codec(stats, codec(3, 0.02))
    with pytest.raises(ValueError, match=r"view of v must be observed.*fraction 0\.03"):
        fit_codec(stats, codec(3, 0.03), "none")
    with pytest.raises(ValueError, match=r"at most max_fraction = 0\.1, got 0\.2"):
        fit_codec(stats, codec(3, 0.2), "none")
    post = CodecSpec(k=codec(3, 0.02).k, v=codec(3, 0.02).v, key_domain="post")
    with pytest.raises(ValueError, match="pre for fitted keys, got post"):
        fit_codec(stats, post, "none")
