"""docs/FORMAT.md as another engine would write it, in numpy from that page, against the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvsmith.codec import Codec
from kvsmith.layout import DTYPES
from kvsmith.spec import CacheSpec
from tests.golden import GEOMETRY, golden_parameters

H, D, T = 2, 16, 32
Array = NDArray[Any]


def tables(q: Mapping[str, Any], own: Mapping[str, Array]) -> tuple[Array, Array]:
    """(lut, edges) of the page's table."""
    if "lut" in own:
        return own["lut"], own["edges"]
    count = 2 ** q["bits"]
    if q["kind"] == "uniform":
        lut = np.linspace(-1, 1, count)
    else:
        lut = np.array([NormalDist().inv_cdf((j + 0.5) / count) for j in range(count)])
        lut = lut / lut.max()
    lut = lut.astype(np.float32)
    return lut, (lut[1:] + lut[:-1]) / 2


def top_k(token: Array, slots: int) -> set[int]:
    """Positions of the outliers of one token [H * D]; its values differ."""
    order = [int(i) for i in np.argsort(token)]
    half = slots // 2
    low, high, rest = order[:half], order[len(order) - half :], order[half : len(order) - half]
    if slots % 2:
        median = token[order[(len(order) - 1) // 2]]
        above, below = token[rest[-1]] - median, median - token[rest[0]]
        high = [*high, rest[-1]] if above >= below else high
        low = [*low, rest[0]] if above < below else low
    return {*low, *high}


def ranges(x: Array, q: Mapping[str, Any], own: Mapping[str, Array], slots: int) -> Array:
    """(scale, zero) [2, H, T, D] of x [H, T, D]."""
    if q["range"] == "calibrated":
        return np.stack([np.broadcast_to(own[n][:, None], x.shape) for n in ("scale", "zero")])
    found, group = np.empty((2, *x.shape), np.float32), q["group_size"]
    for h, t, d in np.ndindex(*x.shape):
        if q["axis"] == "channel":
            near = x[h, t // group * group : (t // group + 1) * group, d]
        elif group:
            near = x[h, t, d // group * group : (d // group + 1) * group]
        else:
            token = x[:, t].reshape(-1)
            near = np.delete(token, sorted(top_k(token, slots)))
        found[:, h, t, d] = (near.max() - near.min()) / 2, (near.max() + near.min()) / 2
    return found.astype(np.float16).astype(np.float32)


def stored(x: Array, codec: Mapping[str, Any], own: Mapping[str, Array]) -> Array:
    """What a cache gives back for x [H, T, D]."""
    q, outliers = codec["quantizer"], codec.get("outliers")
    slots = round(outliers["fraction"] * H * D) if outliers else 0
    scale, zero = ranges(x, q, own, slots)
    lut, edges = tables(q, own)
    normal = (x - zero) / scale
    codes = (normal[..., None] > edges).sum(-1)
    result = lut[codes] * scale + zero
    for t in range(T if slots else 0):
        token = np.abs(normal[:, t]).reshape(-1)
        beyond = codec["outliers"].get("select", "beyond_range") == "beyond_range"
        if q["range"] != "calibrated":
            chosen, beyond = top_k(x[:, t].reshape(-1), slots), False
        elif beyond:
            chosen = np.argsort(-token)[:slots]
        else:
            chosen = np.argsort(-np.abs(x[:, t] - result[:, t]).reshape(-1))[:slots]
        for i in chosen:
            h, d = divmod(int(i), D)
            if not beyond or token[i] > 1:
                result[h, t, d] += np.float32(np.float16(x[h, t, d] - result[h, t, d]))
    return result


CODECS: dict[str, dict[str, Any]] = {
    "nuq, thresholds": {
        "quantizer": {"kind": "nuq", "bits": 3, "axis": "channel", "range": "calibrated"},
        "outliers": {"kind": "static_threshold", "fraction": 0.2},
    },
    "nuq, largest errors": {
        "quantizer": {"kind": "nuq", "bits": 3, "axis": "channel", "range": "calibrated"},
        "outliers": {
            "kind": "static_threshold",
            "fraction": 0.2,
            "range_fraction": 0.01,
            "select": "largest_error",
        },
    },
    "nuq with Q-Norm, an odd number of extremes": {
        "quantizer": {"kind": "nuq", "bits": 2, "q_norm": True},
        "outliers": {"kind": "top_k", "fraction": 0.1},
    },
    "nuq, an even number of extremes": {
        "quantizer": {"kind": "nuq", "bits": 4},
        "outliers": {"kind": "top_k", "fraction": 0.12},
    },
    "normal levels": {"quantizer": {"kind": "nuq", "bits": 4, "table": "nf"}},
    "uniform, calibrated": {
        "quantizer": {"kind": "uniform", "bits": 5, "axis": "channel", "range": "calibrated"}
    },
    "uniform, whole tokens": {"quantizer": {"kind": "uniform", "bits": 8}},
    "uniform, channels in groups": {"quantizer": {"kind": "uniform", "bits": 2, "group_size": 8}},
    "uniform, tokens in groups": {
        "quantizer": {"kind": "uniform", "bits": 3, "axis": "channel", "group_size": 16}
    },
}


@pytest.mark.parametrize("name", CODECS)
def test_the_page_says_what_the_runtime_does(name: str) -> None:
    identity = {"quantizer": {"kind": "identity"}}
    spec = CacheSpec.parse({"codec": {"k": CODECS[name], "v": identity}})
    parameters = golden_parameters(spec, GEOMETRY)
    prefix = "layers.1.k."
    own = {n.removeprefix(prefix): t for n, t in parameters.items() if n.startswith(prefix)}
    codec = Codec(spec.codec.k, H, D, DTYPES[spec.codec.store_dtype], own, prefix)
    x = torch.randn(1, H, T, D, generator=torch.Generator().manual_seed(3))
    given = codec.decode(codec.encode(x))[0].numpy()
    defaults = {"axis": "token", "group_size": None, "range": "online"}
    full = {**CODECS[name], "quantizer": {**defaults, **CODECS[name]["quantizer"]}}
    expected = stored(x[0].numpy(), full, {n: t.numpy() for n, t in own.items()})
    # Both compute in float32; products and sums are rounded in another order.
    assert np.abs(given - expected).max() <= 4e-6
    assert np.abs(given - x[0].numpy()).max() > 1e-3
