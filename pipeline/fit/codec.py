"""All parameters of a layer's codec from its statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsmith.codec import Codec, midpoints
from kvsmith.errors import explain
from kvsmith.layout import parameter_tensors
from kvsmith.pipeline.fit.kmeans import fit_codebook
from kvsmith.pipeline.fit.points import Sensitivity, weighted_points
from kvsmith.pipeline.fit.q_norm import q_norm
from kvsmith.pipeline.fit.thresholds import affine, channel_range
from kvsmith.pipeline.statistics.layer import LayerStatistics
from kvsmith.pipeline.statistics.plan import Need, TensorName, check_fraction, needs
from kvsmith.spec import NUQ, CodecSpec, TensorCodec


def fit_codec(
    stats: LayerStatistics, codec: CodecSpec, sensitivity: Sensitivity = "fisher"
) -> dict[str, Tensor]:
    """Fit the parameters of one layer.

    Args:
        stats: of that layer.
        codec: what is stored how.
        sensitivity: what an error weighs: "fisher" is the published method, "fisher_scale" its
            equation with the squared range, "none" plain k-means.

    Returns:
        The tensors that `layout.parameter_tensors` lists, named `k.lut`, `k.edges`, `k.scale`,
        `k.zero`, `v.lut`, ... All elements of keys share one codebook, all elements of values
        another.

    Raises:
        ValueError: the statistics do not hold what the codec needs.
    """
    fitted: dict[str, Tensor] = {}
    for name, part in tensor_codecs(codec):
        for key, tensor in _fit_tensor(stats, name, part, codec.key_domain, sensitivity).items():
            fitted[f"{name}.{key}"] = tensor
    return fitted


def normalised_rmse(
    stats: LayerStatistics, name: TensorName, codec: TensorCodec, fitted: dict[str, Tensor]
) -> float:
    """Root mean squared error of elements that are not outliers, in half widths of their range.

    Args:
        stats: of one layer.
        name: "k" or "v".
        codec: a codec with parameters.
        fitted: what `fit_codec` gave.

    Returns:
        The error; NaN for a codec without parameters, which no statistics describe.
    """
    need = needs(codec)
    if need is None:
        return float("nan")
    dim = stats.layer.k_dim if name == "k" else stats.layer.v_dim
    own = {
        key.removeprefix(f"{name}."): t for key, t in fitted.items() if key.startswith(f"{name}.")
    }
    tables = Codec(codec, stats.layer.kv_heads, dim, torch.float32, own, name).tables
    points, counts = weighted_points(stats, name, need, codec.range_fraction, "none")
    decoded = tables.lut.double()[torch.bucketize(points, tables.edges.double())]
    return float(((points - decoded) ** 2 * counts).sum().div(counts.sum()).sqrt())


def tensor_codecs(codec: CodecSpec) -> tuple[tuple[TensorName, TensorCodec], ...]:
    """The codecs of keys and values with their names."""
    return ("k", codec.k), ("v", codec.v)


def _fit_tensor(
    stats: LayerStatistics,
    name: TensorName,
    codec: TensorCodec,
    key_domain: str,
    sensitivity: Sensitivity,
) -> dict[str, Tensor]:
    need = needs(codec)
    if need is None:
        return {}
    if name == "k" and key_domain != "pre":
        remedy = "Statistics are of keys before RoPE."
        raise ValueError(
            explain("codec.key_domain", "value", "pre for fitted keys", key_domain, remedy)
        )
    dim = stats.layer.k_dim if name == "k" else stats.layer.v_dim
    info = parameter_tensors(codec, stats.layer.kv_heads, dim)
    fitted: dict[str, Tensor] = {}
    if need == "channels":
        check_fraction(codec.range_fraction, stats.plan.max_fraction)
        scale, zero = affine(*channel_range(stats.channels(name)[0], codec.range_fraction))
        fitted |= {"scale": scale.view(info["scale"].shape), "zero": zero.view(info["zero"].shape)}
    if "lut" in info:
        fitted |= _fit_codebook(stats, name, codec, need, sensitivity)
    return {key: fitted[key].cpu().contiguous() for key in info}


def _fit_codebook(
    stats: LayerStatistics,
    name: TensorName,
    codec: TensorCodec,
    need: Need,
    sensitivity: Sensitivity,
) -> dict[str, Tensor]:
    assert isinstance(codec.quantizer, NUQ)
    points, weights = weighted_points(stats, name, need, codec.range_fraction, sensitivity)
    lut = fit_codebook(points, weights, 2**codec.quantizer.bits)
    edges = midpoints(lut)
    if codec.quantizer.q_norm:
        lut = q_norm(*weighted_points(stats, name, need, codec.range_fraction, "none"), lut, edges)
    return {"lut": lut, "edges": edges}
