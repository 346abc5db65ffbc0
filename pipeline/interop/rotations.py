"""Rotations of keys and values that other programs computed, as parameters of a codec.

A file holds one side: safetensors, or what torch's `save` wrote, as OSCAR's zoo of rotations does
(nothing in it is run). It holds either one tensor with the layers as its first dimension, or
tensors by layer: a list, or a mapping whose keys are or contain the index.
A layer's matrix is [D, D], the same for all its heads, or [H, D, D].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kvsmith.errors import explain
from kvsmith.geometry import ModelGeometry
from kvsmith.pipeline.interop.pickles import read_torch
from kvsmith.pipeline.stage import read_safetensors
from kvsmith.spec import CodecSpec


def read_rotations(
    files: tuple[Path, Path], codec: CodecSpec, shape: ModelGeometry
) -> dict[str, Tensor]:
    """The rotations that a codec takes from outside.

    Args:
        files: of the keys and of the values; only those of sides with `rotation: given` are read.
        codec: what the rotations are for.
        shape: the model.

    Returns:
        `layers.{i}.{k,v}.rotation` -> [H, D, D] float32.

    Raises:
        FileNotFoundError, ValueError: no such file, something in it that is not read, or matrices
            that do not fit the codec or the model.
    """
    found = {}
    for name, path in zip("kv", files, strict=True):
        wanted = [i for i in shape.owners if _side(codec, i, name).rotation == "given"]
        matrices = _by_layer(path) if wanted else {}
        for i in wanted:
            layer = shape.layers[i]
            dim = layer.k_dim if name == "k" else layer.v_dim
            where = f"{path}: layer {i}"
            if i not in matrices:
                raise ValueError(explain(where, "rotation", "present", "nothing"))
            matrix = matrices[i].float()
            if matrix.dim() == 2:
                matrix = matrix.expand(layer.kv_heads, -1, -1)
            if tuple(matrix.shape) != (layer.kv_heads, dim, dim):
                expected = f"[{dim}, {dim}], or one for each of {layer.kv_heads} KV heads"
                raise ValueError(explain(where, "rotation", expected, str(list(matrix.shape))))
            found[f"layers.{i}.{name}.rotation"] = matrix.contiguous()
    if not found:
        remedy = "Choose a codec with rotation: given, such as codec=oscar2."
        raise ValueError(explain("rotations", "codec", "one that takes them", "another", remedy))
    return found


def _side(codec: CodecSpec, layer: int, name: str) -> Any:
    own = codec.at(layer)
    return own.k if name == "k" else own.v


def _by_layer(path: Path) -> dict[int, Tensor]:
    """Matrices by the index of their layer."""
    data = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    while isinstance(data, Mapping) and len(data) == 1:
        (data,) = data.values()  # a single tensor, or a table of them, under one name
    if isinstance(data, Tensor):
        data = list(data) if data.dim() > 2 else [data]
    if isinstance(data, (list, tuple)):
        data = dict(enumerate(data))
    if not isinstance(data, Mapping):
        raise ValueError(explain(str(path), "content", "matrices by layer", type(data).__name__))
    found = {}
    for key, value in data.items():
        index = re.search(r"\d+", str(key))
        if isinstance(value, Tensor) and value.dim() in (2, 3) and index:
            found[int(index[0])] = value
    if not found:
        raise ValueError(explain(str(path), "content", "matrices by layer", "none"))
    return found
