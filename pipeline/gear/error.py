"""Error of the parts of GEAR, on keys (after RoPE) and values of the shipped model.

Bits are those of the encoded tensors alone, without dense windows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import DynamicCache

from kvsmith.codec import Codec
from kvsmith.pipeline.codecs import load_codec
from kvsmith.pipeline.data import PydocsData, token_blocks
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.model import ModelConfig, load_model
from kvsmith.spec import CodecSpec, TensorCodec

Pair = tuple[Tensor, Tensor]
Found = tuple[float, float]  # bits an element, squared error relative to the tensor


def captured(windows: int = 4, length: int = 1024) -> list[Pair]:
    """Keys and values [B, H, T, D] float32 of every layer, on held-out text."""
    model, tokenizer = load_model(ModelConfig(path="artifacts/models/tiny"))
    ids = token_blocks(tokenizer, PydocsData(), "heldout", windows, length, 0)
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache)
    return [(layer.keys.float(), layer.values.float()) for layer in cache.layers]


def measure(x: Tensor, spec: TensorCodec, block: int) -> Found:
    """What a codec that encodes `block` tokens at once costs and leaves of x [B, H, T, D]."""
    codec = Codec(spec, x.shape[1], x.shape[3], torch.float16, {}, "x", block)
    tensors = codec.encode(x)
    size = 8 * sum(t.nbytes for t in tensors.values()) / x.numel()
    return size, relative(x - codec.decode(tensors), x)


def relative(left: Tensor, x: Tensor) -> float:
    """Squared norm of what is left of x, over that of x."""
    return float(left.pow(2).sum() / x.pow(2).sum())


def ways(full: CodecSpec) -> dict[str, CodecSpec]:
    """A codec with its parts off and on."""

    def only(c: TensorCodec, sparse: bool, low: bool) -> TensorCodec:
        outliers, low_rank = c.outliers if sparse else None, c.low_rank if low else None
        return replace(c, outliers=outliers, low_rank=low_rank)

    return {
        "Q" + " + S" * s + " + L" * low: replace(
            full, k=only(full.k, s, low), v=only(full.v, s, low)
        )
        for s, low in ((False, False), (True, False), (False, True), (True, True))
    }


def parts(log: Run) -> None:
    """Relative error, and the share of its square that each part removes, layer by layer."""
    layers = captured()
    for name in ("gear4", "gear3", "gear2"):
        tried, rows = ways(load_codec(name)), []
        for i, pair in enumerate(layers):
            for side, x in zip("kv", pair, strict=True):
                left = [measure(x, getattr(w, side), w.block_size)[1] for w in tried.values()]
                shares = [f"{100 * (1 - e / left[0]):.1f} %" for e in left[1:]]
                rows.append([str(i), side, *(f"{e**0.5:.4f}" for e in left), *shares])
        columns = ("layer", "side", *tried, "S takes", "L takes", "both take")
        log.table(f"{name}: relative error, and shares of its square", columns, rows)
