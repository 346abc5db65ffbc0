"""Decode time of one attention layer on the CPU, against transformers' own caches in the same run.

    python -m kvsmith.pipeline.bench_decode [--tokens 2048 8192 32768] [--repeats 5] [--out FILE]

One step is what a model does a token and layer: store the new key and value, attend to everything.
Shape: 32 query and 8 KV heads of 128 channels, batch 1, bfloat16, keys before RoPE with cosines of
every chunk made anew. Ours is what users run without a GPU: C where a compiler is there, plain
torch with KVSMITH_KERNELS=reference. DynamicCache and
QuantizedCache (quanto, 4 bits, where optimum-quanto is installed) run their own update and torch's
scaled_dot_product_attention; they get rotated keys, so RoPE of old keys costs them nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig
from transformers.cache_utils import DynamicLayer, QuantoQuantizedLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.utils import is_optimum_quanto_available

from kvsmith.attention import Scores, attend_store
from kvsmith.codec import Codec, midpoints, normal_levels
from kvsmith.fused import UNLIMITED
from kvsmith.geometry import LayerGeometry
from kvsmith.key_rotation import KeyRotation
from kvsmith.layout import DTYPES
from kvsmith.pairing import find_pairing
from kvsmith.rope import Positions, RotarySource, rotation_function
from kvsmith.spec import NUQ, CodecSpec, StaticThreshold, TensorCodec, TopK
from kvsmith.store import LayerStore

HEADS, KV_HEADS, DIM = 32, 8, 128
SHAPE = LayerGeometry(KV_HEADS, HEADS, DIM, DIM)
CONFIG = LlamaConfig(
    hidden_size=HEADS * DIM,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    num_hidden_layers=1,
    intermediate_size=8,
    vocab_size=8,
    max_position_embeddings=1 << 20,
)
Step = Callable[[], object]


class Causal:
    """One query after everything: nothing is hidden."""

    padding = None
    is_causal = True
    reach = UNLIMITED

    def window(self, rows: slice, columns: slice) -> torch.Tensor | None:
        return None


def ours(bits: int, fraction: float, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> Step:
    """A step of a KVQuant layer that holds k and v [1, H, T, D]."""
    lut = normal_levels(bits)
    table = {"lut": lut, "edges": midpoints(lut)}
    ranges = {"scale": torch.full((KV_HEADS, DIM), 2.5), "zero": torch.zeros(KV_HEADS, DIM)}
    spec = CodecSpec(
        TensorCodec(
            NUQ(bits=bits, axis="channel", range="calibrated"),
            StaticThreshold(fraction) if fraction else None,
        ),
        TensorCodec(NUQ(bits=bits), TopK(fraction) if fraction else None),
    )
    codecs = (
        Codec(spec.k, KV_HEADS, DIM, DTYPES[spec.store_dtype], {**table, **ranges}, "k"),
        Codec(spec.v, KV_HEADS, DIM, DTYPES[spec.store_dtype], table, "v"),
    )
    store = LayerStore(spec, SHAPE, 128, *codecs)
    store.append(k, v)
    positions = Positions(128)
    positions.append(torch.arange(k.shape[2] + 4096)[None])
    source = RotarySource(LlamaRotaryEmbedding(CONFIG))
    turn = rotation_function(LlamaAttention(CONFIG, 0))
    assert turn is not None

    pairing = find_pairing(turn, DIM, DIM, q.device)
    rotate = KeyRotation(positions, source, q.dtype, turn, pairing)
    new_k, new_v = k[:, :, :1], v[:, :, :1]

    def step() -> object:
        before = store.length
        store.append(new_k, new_v)
        positions.end_pass()
        return attend_store(q, new_k, new_v, store, before, Causal(), rotate, Scores(DIM**-0.5))

    return step


def theirs(layer: Any, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> Step:
    """A step of a transformers cache layer that holds k and v."""
    layer.update(k, v)
    new_k, new_v = k[:, :, :1], v[:, :, :1]

    def step() -> object:
        keys, values = layer.update(new_k, new_v)
        return scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    return step


def candidates(k: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> dict[str, Callable[[], Step]]:
    """name -> maker of a step; made one at a time so that only one cache is in memory."""
    makers: dict[str, Callable[[], Step]] = {
        "DynamicCache": lambda: theirs(DynamicLayer(), k, v, q),
    }
    if not is_optimum_quanto_available():
        sys.stderr.write("optimum-quanto is not installed: no QuantizedCache in the table\n")
    else:
        makers["QuantizedCache 4"] = lambda: theirs(QuantoQuantizedLayer(nbits=4), k, v, q)
    for bits in (4, 3, 2):
        for fraction in (0.01, 0.0):
            name = f"kvsmith nuq{bits}" + ("-1%" if fraction else "")
            makers[name] = partial(ours, bits, fraction, k, v, q)
    return makers


def measure(step: Step, repeats: int) -> list[float]:
    """Milliseconds of `repeats` steps after one that warms up."""
    step()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - begin))
    return times


@torch.inference_mode()
def run(tokens: list[int], repeats: int) -> list[dict[str, Any]]:
    """Measure every candidate at every length.

    Args:
        tokens: cached tokens T.
        repeats: timed steps of each.

    Returns:
        Rows with tokens, name, p20/p50/p80 in ms, and p50 over that of DynamicCache.
    """
    rows: list[dict[str, Any]] = []
    for count in tokens:
        torch.manual_seed(0)
        k, v = torch.randn(2, 1, KV_HEADS, count, DIM, dtype=torch.bfloat16).unbind(0)
        q = torch.randn(1, HEADS, 1, DIM, dtype=torch.bfloat16)
        base = None
        for name, make in candidates(k, v, q).items():
            times = measure(make(), repeats)
            low, mid, high = statistics.quantiles(times, n=10, method="inclusive")[1:8:3]
            base = base or mid
            rows.append(
                {
                    "tokens": count,
                    "name": name,
                    "p20": low,
                    "p50": mid,
                    "p80": high,
                    "over_dynamic": mid / base,
                }
            )
            sys.stdout.write(
                f"{count:>7} {name:<18} {mid:9.1f} ms  ({low:.1f} to {high:.1f})"
                f"  {mid / base:6.2f} x DynamicCache\n"
            )
            sys.stdout.flush()
    return rows


def main() -> None:
    """Command line."""

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    args = parser.parse_args()
    rows = run(args.tokens, args.repeats)
    if args.out:
        facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
