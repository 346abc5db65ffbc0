"""Parameters of a codec from `quantizers.pickle`, as KVQuant's own program writes it.

Source: KVQuant, arXiv:2401.18079, its quant/llama_simquant.py: name of a projection -> (upper,
lower, [codebook], Q-Norm's scale and offset where it is on). Keys use the thresholds of their
channels; values find theirs when they are stored, so only their codebook is taken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kvsmith.codec import midpoints
from kvsmith.errors import explain
from kvsmith.geometry import ModelGeometry
from kvsmith.layout import parameter_tensors
from kvsmith.pipeline.fit.thresholds import affine
from kvsmith.pipeline.interop.pickles import read_pickle
from kvsmith.spec import NUQ, CodecSpec, TensorCodec

PROJECTION = re.compile(r".*\.layers\.(\d+)\..*\b([kv])_proj")


def read_quantizers(path: Path, codec: CodecSpec, shape: ModelGeometry) -> dict[str, Tensor]:
    """The tensors that a codec owns, from KVQuant's file.

    Args:
        path: `quantizers.pickle`.
        codec: what the quantizers are for, such as `kvquant_nuq4_o1`.
        shape: the model.

    Returns:
        `layers.{i}.{k,v}.{name}` -> float32 tensor.

    Raises:
        FileNotFoundError, ValueError: no such file, something in it that is not read, or quantizers
            that do not fit the codec or the model.
    """
    data = read_pickle(path)
    entries = _entries(data, str(path))
    found = {}
    for i in shape.owners:
        layer, own = shape.layers[i], codec.at(i)
        for name, part, dim in (("k", own.k, layer.k_dim), ("v", own.v, layer.v_dim)):
            info = parameter_tensors(part, layer.kv_heads, dim)
            if not info:
                continue
            where = f"{path}: layers.{i}.{name}"
            if (i, name) not in entries:
                raise ValueError(explain(where, "quantizer", "present", "nothing"))
            tensors = _tensors(entries[i, name], part, layer.kv_heads * dim, where)
            found.update({f"layers.{i}.{name}.{n}": tensors[n].view(info[n].shape) for n in info})
    return found


def _entries(data: Any, where: str) -> dict[tuple[int, str], Sequence[Any]]:
    if not isinstance(data, dict):
        raise ValueError(explain(where, "content", "a dict of quantizers", type(data).__name__))
    found: dict[tuple[int, str], Sequence[Any]] = {}
    for name, entry in data.items():
        match = PROJECTION.fullmatch(str(name))
        if match and isinstance(entry, (tuple, list)) and len(entry) >= 2:
            found[int(match[1]), match[2]] = entry
    if not found:
        raise ValueError(explain(where, "content", "quantizers of k_proj and v_proj", "none"))
    return found


def _tensors(entry: Sequence[Any], codec: TensorCodec, width: int, where: str) -> dict[str, Tensor]:
    tensors = {}
    q = codec.quantizer
    if isinstance(q, NUQ) and q.table == "fitted":
        if len(entry) < 3 or not isinstance(entry[2], (list, tuple)) or not entry[2]:
            raise ValueError(explain(where, "codebook", "present", "nothing"))
        lut = entry[2][0].flatten().float().sort().values
        if len(lut) != 2**q.bits:
            remedy = "Export with the codec of that width."
            raise ValueError(explain(where, "codebook", f"{2**q.bits} values", len(lut), remedy))
        if q.q_norm != (len(entry) > 3):
            expected = "one with Q-Norm" if q.q_norm else "one without Q-Norm"
            raise ValueError(explain(where, "quantizer", expected, "the other"))
        tensors = {"lut": lut, "edges": midpoints(lut)}
        if q.q_norm:
            tensors["lut"] = lut * float(entry[3]) + float(entry[4])
    lower, upper = (x.flatten().double() for x in (entry[1], entry[0]))
    if codec.quantizer.kind != "identity" and codec.quantizer.range == "calibrated":
        if len(lower) != width or len(upper) != width:
            raise ValueError(explain(where, "thresholds", f"{width} channels", len(upper)))
        tensors["scale"], tensors["zero"] = affine(lower, upper)
    return tensors
