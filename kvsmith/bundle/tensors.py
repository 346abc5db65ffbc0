"""The parameters of a bundle: their names and shapes, and what they may hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from kvsmith.bundle.errors import refuse
from kvsmith.bundle.strict_json import DAMAGED
from kvsmith.geometry import ModelGeometry
from kvsmith.layout import TensorInfo, less_parameters, parameter_tensors
from kvsmith.spec import NUQ, CacheSpec, TensorCodec

ORTHOGONAL = 1e-3  # largest element of R R^T - I


def expected_tensors(spec: CacheSpec, geometry: ModelGeometry) -> dict[str, TensorInfo]:
    """Every tensor of a bundle: `layers.{i}.{k|v|less}.{name}`, i over the layers with tokens."""
    codecs = {
        f"layers.{i}.{part}.{name}": info
        for i, part, codec, heads, dim in _parts(spec, geometry)
        for name, info in parameter_tensors(codec, heads, dim).items()
    }
    return codecs | less_parameters(spec, geometry)


def check_parameters(
    spec: CacheSpec, geometry: ModelGeometry, tensors: Mapping[str, torch.Tensor], where: str
) -> None:
    """Refuse parameters that no encoder or decoder can work with.

    Args:
        spec: the cache.
        geometry: the model.
        tensors: name -> tensor of the whole bundle.
        where: folder or file, for errors.

    Raises:
        BundleError: a tensor that is missing, unknown, of another dtype or shape, not finite, not
            sorted, not positive, or whose decoded values leave float32.
    """
    expected = expected_tensors(spec, geometry)
    _check_names(tensors.keys(), expected, where)
    for name, info in expected.items():
        tensor = tensors[name]
        if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
            shown = f"{tensor.dtype} {list(tensor.shape)}"
            raise refuse(where, name, f"{info.dtype} {list(info.shape)}", shown)
        if not bool(torch.isfinite(tensor).all()):
            raise refuse(where, name, "finite", "NaN or infinity", "Calibrate again.")
    for i, part, codec, heads, dim in _parts(spec, geometry):
        prefix = f"layers.{i}.{part}"
        own = {n: tensors[f"{prefix}.{n}"] for n in parameter_tensors(codec, heads, dim)}
        _check_values(codec, own, f"{where}: {prefix}")


def _parts(
    spec: CacheSpec, geometry: ModelGeometry
) -> Iterator[tuple[int, str, TensorCodec, int, int]]:
    """(layer, "k" or "v", codec, heads, dim) of everything that stores tokens."""
    for i in geometry.owners:
        layer, codec = geometry.layers[i], spec.codec.at(i)
        yield i, "k", codec.k, layer.kv_heads, layer.k_dim
        yield i, "v", codec.v, layer.kv_heads, layer.v_dim


def _check_values(codec: TensorCodec, own: Mapping[str, torch.Tensor], where: str) -> None:
    remedy = "Calibrate again."
    lut, edges = own.get("lut"), own.get("edges")
    if lut is not None and edges is not None:
        if not bool((lut.diff() > 0).all()):
            raise refuse(where, "lut", "strictly increasing", lut.tolist(), remedy)
        if not bool((edges.diff() >= 0).all()):
            raise refuse(where, "edges", "sorted", edges.tolist(), remedy)
        # Q-Norm shifts the codebook away from the boundaries it was fitted with.
        plain = isinstance(codec.quantizer, NUQ) and not codec.quantizer.q_norm
        if plain and not bool(((lut[:-1] <= edges) & (edges <= lut[1:])).all()):
            raise refuse(where, "edges", "between their neighbours in lut", edges.tolist(), remedy)
    if (turn := own.get("rotation")) is not None:
        off = float((turn @ turn.mT - torch.eye(turn.shape[-1])).abs().max())
        if off > ORTHOGONAL:
            raise refuse(where, "rotation", f"orthogonal to {ORTHOGONAL}", off, remedy)
    scale, zero = own.get("scale"), own.get("zero")
    if scale is None or zero is None:
        return
    if not bool((scale > 0).all()):
        raise refuse(where, "scale", "positive", float(scale.min()), remedy)
    reach = 1.0 if lut is None else max(1.0, float(lut.abs().max()))
    if not bool(torch.isfinite(zero.abs() + scale * reach).all()):
        raise refuse(where, "decoded values", "finite in float32", "infinity", remedy)


def _check_names(names: Any, expected: Mapping[str, TensorInfo], where: str) -> None:
    if missing := sorted(expected.keys() - names):
        raise refuse(where, f"tensor {missing[0]}", "present", "nothing", DAMAGED)
    if unknown := sorted(names - expected.keys()):
        raise refuse(where, "tensor", "one that the codec owns", repr(unknown[0]))
