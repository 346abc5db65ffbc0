"""Statistics: exact where they claim to be, whatever the order and the split of the tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvsmith.geometry import LayerGeometry
from kvsmith.pipeline.statistics import (
    ChannelExtremes,
    ChannelHistogram,
    LayerStatistics,
    TokenHistogram,
    TokenView,
    plan_for,
)
from kvsmith.spec import NUQ, CodecSpec, StaticThreshold, TensorCodec, TopK
from tests.oracles import kvquant as oracle

H, D, N = 2, 16, 600
LAYER = LayerGeometry(kv_heads=H, query_heads=4, k_dim=D, v_dim=D)
KVQUANT = CodecSpec(
    k=TensorCodec(NUQ(bits=3, axis="channel", range="calibrated"), StaticThreshold(fraction=0.02)),
    v=TensorCodec(NUQ(bits=3), TopK(fraction=0.1)),
)


def tokens(n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Channels of different centres, widths and tails, and squared gradients."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, H, D, generator=generator)
    x = x * torch.logspace(-3, 3, D) + 5 * torch.randn(H, D, generator=generator)
    x[:: n // 7 or 1] *= 9  # a few tokens far out
    return x, torch.randn(n, H, D, generator=generator) ** 2 * 1e-6


def parts(x: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    return list(x.split([*sizes, len(x) - sum(sizes)]))


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.01, 0.02])
@pytest.mark.parametrize("n", [1, 2, 37, N])
def test_thresholds_equal_numpy_percentiles(fraction: float, n: int) -> None:
    x, _ = tokens(n)
    extremes = ChannelExtremes(H * D, n, max_fraction=0.02)
    for part in x.split(101):
        extremes.update(part)
    lower, upper = oracle.channel_range(x.flatten(1).numpy(), fraction)
    got_lower, got_upper = extremes.percentiles(fraction / 2)
    np.testing.assert_allclose(got_lower.numpy(), lower, rtol=1e-6, atol=0)
    np.testing.assert_allclose(got_upper.numpy(), upper, rtol=1e-6, atol=0)


def test_extremes_are_few_and_refuse_what_they_do_not_hold() -> None:
    x, _ = tokens()
    extremes = ChannelExtremes(H * D, N, max_fraction=0.02)
    extremes.update(x)
    assert extremes.smallest.shape == (H * D, 8)  # floor(600 * 0.01) + 2
    with pytest.raises(ValueError, match=r"at most max_fraction = 0\.02, got 0\.03"):
        extremes.percentiles(0.015)


@given(st.lists(st.integers(1, 150), min_size=1, max_size=3), st.integers(0, 3))
def test_any_split_and_order_gives_the_same_channels(sizes: list[int], seed: int) -> None:
    x, fisher = tokens(seed=seed)
    whole = ChannelHistogram(H * D)
    whole.update(x, fisher)
    merged = ChannelHistogram(H * D)
    order = torch.randperm(N)
    for values, weights in zip(
        parts(x[order], tuple(sizes)), parts(fisher[order], tuple(sizes)), strict=True
    ):
        one = ChannelHistogram(H * D)
        one.update(values, weights)
        merged.merge(one)
    for name in ("count", "exponent", "minimum", "maximum"):
        assert torch.equal(getattr(merged, name), getattr(whole, name)), name
    # float32 sums of positive terms in another order: n roundings of 2^-24 each at most
    assert merged.fisher is not None and whole.fisher is not None
    torch.testing.assert_close(merged.fisher, whole.fisher, rtol=N * 2**-24, atol=0)


def test_channel_bins_hold_exactly_the_values_that_lie_in_them() -> None:
    x, fisher = tokens()
    histogram = ChannelHistogram(H * D)
    for values, weights in zip(x.split(50), fisher.split(50), strict=True):
        histogram.update(values, weights)
    assert torch.equal(histogram.count.sum(1), torch.full((H * D,), float(N)))
    start, width = histogram.bins()
    flat = x.flatten(1).double().numpy()
    for channel in range(H * D):
        low = start[channel].numpy()
        order = np.argsort(low)
        edges = np.append(low[order], low.max() + width[channel].item())
        expected, _ = np.histogram(flat[:, channel], edges)
        # numpy's last bin is closed; ours is not, and the maximum is never on its upper edge
        np.testing.assert_array_equal(histogram.count[channel].numpy()[order], expected)
    span = (x.flatten(1).amax(0) - x.flatten(1).amin(0)).double()
    assert bool((span / width[:, 0] >= 511).all()), "at least half of the bins are in use"


def test_channel_histogram_copes_with_constant_and_far_off_channels() -> None:
    x = torch.zeros(40, 1, 4)
    x[:, 0, 1] = 1e6 + torch.arange(40) / 16
    x[:, 0, 2] = -3.5
    x[:, 0, 3] = 1e-30 * torch.arange(40)
    histogram = ChannelHistogram(4, fisher=False)
    for part in x.split(9):
        histogram.update(part)
    start, width = histogram.bins()
    held = histogram.count > 0
    assert held.sum(1).tolist()[0] == held.sum(1).tolist()[2] == 1
    assert held.sum(1).tolist()[1] == 40, "neighbours of 1/16 at a million stay apart"
    assert bool(((start <= histogram.maximum[:, None].double()) | ~held).all())
    assert bool((width > 0).all())


@pytest.mark.parametrize(("slots", "group"), [(0, 0), (2, 0), (3, 0), (0, 8)])
def test_token_histogram_counts_the_normalised_values(slots: int, group: int) -> None:
    x, fisher = tokens()
    whole = TokenHistogram(slots, group)
    whole.update(x, fisher)
    merged = TokenHistogram(slots, group)
    for values, weights in zip(x.split(77), fisher.split(77), strict=True):
        one = TokenHistogram(slots, group)
        one.update(values, weights)
        merged.merge(one)
    assert torch.equal(merged.count, whole.count) and merged.seen == whole.seen == N
    assert merged.fisher is not None and whole.fisher is not None
    torch.testing.assert_close(merged.fisher, whole.fisher, rtol=1e-12, atol=0)

    rows = x.flatten(1).numpy().reshape(-1, group or H * D).astype(np.float64)
    weights = fisher.flatten(1).numpy().reshape(rows.shape).astype(np.float64)
    mask = oracle.token_outliers(rows, slots)
    scale, zero = oracle.affine(*oracle.token_range(rows, mask))
    normal = (rows - zero[:, None]) / scale[:, None]
    assert whole.count.sum() == (~mask).sum()
    points = TokenHistogram.points().numpy()
    step = points[1] - points[0]
    mean = float((whole.count.numpy() * points).sum() / whole.count.sum())
    assert abs(mean - normal[~mask].mean()) < step / 2
    assert float(whole.fisher.sum()) == pytest.approx(weights[~mask].sum(), rel=1e-6)
    expected = (weights * scale[:, None] ** 2)[~mask].sum()
    assert float(whole.fisher_scale.sum()) == pytest.approx(expected, rel=1e-5)  # type: ignore[union-attr]
    # every token has a smallest and a largest value, both on a point
    assert whole.count[0] >= len(rows) and whole.count[-1] >= len(rows)


def test_layer_statistics_survive_storage_to_the_bit() -> None:
    plan = plan_for([KVQUANT], N, max_fraction=0.02, fractions=(0.0,), fisher=True)
    x, fisher = tokens()
    once, again = LayerStatistics(plan, LAYER), LayerStatistics(plan, LAYER)
    for values, weights in zip(x.split(97), fisher.split(97), strict=True):
        for name in ("k", "v"):
            once.update(name, values, weights)
            again.update(name, values, weights)
        stored = {name: tensor.clone() for name, tensor in again.state_dict().items()}
        again = LayerStatistics(plan, LAYER)
        again.load_state_dict(stored)
    expected = once.state_dict()
    assert expected.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor, expected[name]), name


def test_layer_statistics_refuse_a_foreign_state() -> None:
    plan = plan_for([KVQUANT], N, max_fraction=0.02, fractions=(0.0,), fisher=True)
    state = LayerStatistics(plan, LAYER).state_dict()
    with pytest.raises(ValueError, match=r"'count' must be present, got nothing"):
        LayerStatistics(plan, LAYER).load_state_dict(
            {k: t for k, t in state.items() if k != "k.histogram.count"}
        )
    other = LayerGeometry(kv_heads=1, query_heads=4, k_dim=D, v_dim=D)
    with pytest.raises(ValueError, match=r"must be torch.float32 \[16, .*\], got .*\[32, "):
        LayerStatistics(plan, other).load_state_dict(state)
    with pytest.raises(ValueError, match="also k.surplus"):
        LayerStatistics(plan, LAYER).load_state_dict(state | {"k.surplus": torch.zeros(1)})


def test_a_codec_says_what_must_be_observed() -> None:
    plan = plan_for([KVQUANT], N, max_fraction=0.02, fractions=(0.0, 0.01), fisher=False)
    assert plan.k.channels and not plan.v.channels and plan.k.tokens == ()
    assert set(plan.v.tokens) == {TokenView(0.0), TokenView(0.01), TokenView(0.1)}
    with pytest.raises(ValueError, match=r"at most max_fraction = 0\.01, got 0\.02"):
        plan_for([KVQUANT], N, max_fraction=0.01, fractions=(), fisher=True)
    online = TensorCodec(NUQ(bits=2, axis="channel", group_size=16))
    with pytest.raises(ValueError, match="Use range: calibrated, or table: nf"):
        plan_for([CodecSpec(k=online, v=online)], N, 0.02, (), True)
