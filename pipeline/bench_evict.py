"""Decode time of one evicting layer on the CPU, against DynamicCache in the same run.

    python -m kvsmith.pipeline.bench_evict [--tokens 32768] [--budgets 512 2048] [--repeats 5]
        [--out FILE]

A step is what a model does a token and layer: store the new key and value, attend to what is kept,
score it, evict. Tokens leave 16 at a time, so a measurement is the mean of 16 steps; candidates
take turns. Shape as in `bench_decode`. The prompt's scores are drawn at random, and features of the
state too: time does not depend on them. Times are the process's, so that others do not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from kvsmith.attention import Scores
from kvsmith.codec import midpoints, normal_levels
from kvsmith.eviction.attention import attend_kept, rotate_tokens
from kvsmith.eviction.policy import H2O, Lambda, Policy
from kvsmith.eviction.store import EvictingStore
from kvsmith.eviction.tokens import Tokens
from kvsmith.geometry import ModelGeometry
from kvsmith.key_rotation import KeyRotation
from kvsmith.layout import less_parameters
from kvsmith.less.spec import Less
from kvsmith.pairing import find_pairing
from kvsmith.pipeline.bench_decode import (
    CONFIG,
    DIM,
    HEADS,
    KV_HEADS,
    SHAPE,
    Causal,
    Step,
    theirs,
)
from kvsmith.rope import Positions, RotarySource, rotation_function
from kvsmith.spec import NUQ, CacheSpec, CodecSpec, Identity, TensorCodec
from kvsmith.stores import make_store

BLOCK = 16
SAME = TensorCodec(Identity())
CODECS = {
    "none": CodecSpec(SAME, SAME, block_size=BLOCK),
    "nuq4": CodecSpec(
        TensorCodec(NUQ(bits=4, axis="channel", range="calibrated")),
        TensorCodec(NUQ(bits=4)),
        block_size=BLOCK,
    ),
}
RANK = 8


def new_store(policy: Policy, codec: str, state: bool) -> EvictingStore:
    """An empty layer, with what calibration and training would have found."""
    shape, lut = ModelGeometry((SHAPE,)), normal_levels(4)
    spec = CacheSpec(CODECS[codec], policy, less=Less(rank=RANK) if state else None)
    ranges = {"scale": torch.full((KV_HEADS, DIM), 2.5), "zero": torch.zeros(KV_HEADS, DIM)}
    own = {"lut": lut, "edges": midpoints(lut), **ranges}
    parameters = {f"layers.0.{side}.{name}": t for side in "kv" for name, t in own.items()}
    needed = less_parameters(spec, shape) if state else {}
    parameters |= {name: 0.1 * torch.randn(info.shape) for name, info in needed.items()}
    store = make_store(spec, shape, 0, parameters)
    assert isinstance(store, EvictingStore)
    return store


def ours(store: EvictingStore, k: Tensor, v: Tensor, q: Tensor) -> Step:
    """A step of an evicting layer that has seen k and v [1, H, T, D]."""
    T, positions = k.shape[2], Positions(128)
    positions.append(torch.arange(T + 4096)[None])
    turn = rotation_function(LlamaAttention(CONFIG, 0))
    assert turn is not None
    store.arrange(find_pairing(turn, DIM, DIM, k.device))
    source = RotarySource(LlamaRotaryEmbedding(CONFIG))
    own = source if store.key_domain == "pre" else None
    rotate = KeyRotation(positions, own, q.dtype, turn, store.pairing)
    new_k, new_v, state = k[:, :, :1], v[:, :, :1], store.state

    def fold(gone: Tokens) -> None:
        assert state is not None
        state.fold(rotate_tokens(rotate, gone), gone.v, gone.columns >= 0)

    taken = None if state is None else fold
    scored = store.policy.scored
    store.append(k, v)
    store.settle(torch.rand(1, KV_HEADS, T) if scored else None, taken)

    def step() -> object:
        store.append(new_k, new_v)
        positions.end_pass()
        out, mass = attend_kept(q, new_k, new_v, store, Causal(), rotate, Scores(DIM**-0.5))
        store.settle(mass, taken)
        return out

    return step


def candidates(budgets: list[int], k: Tensor, v: Tensor, q: Tensor) -> Iterator[tuple[str, Step]]:
    """name -> a step."""
    yield "DynamicCache", theirs(DynamicLayer(), k, v, q)
    policies: dict[str, Callable[..., Policy]] = {"lambda": partial(Lambda, sinks=4), "h2o": H2O}
    for budget, (name, policy), codec, state in product(
        budgets, policies.items(), CODECS, (False, True)
    ):
        label = f"{name} {budget} {codec}" + (" state" if state else "")
        yield label, ours(new_store(policy(budget=budget), codec, state), k, v, q)


def block_ms(step: Step) -> float:
    """Milliseconds a step, over as many as tokens are evicted at once."""
    begin = time.process_time()
    for _ in range(BLOCK):
        step()
    return 1e3 * (time.process_time() - begin) / BLOCK


@torch.inference_mode()
def run(tokens: int, budgets: list[int], repeats: int) -> list[dict[str, Any]]:
    """Measure every candidate.

    Args:
        tokens: tokens T that came before.
        budgets: tokens that a layer keeps.
        repeats: measurements of 16 steps.

    Returns:
        Rows with name, least, median and most ms, and how many times DynamicCache's median that is.
    """
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, KV_HEADS, tokens, DIM, dtype=torch.bfloat16).unbind(0)
    steps = dict(candidates(budgets, k, v, torch.randn(1, HEADS, 1, DIM, dtype=torch.bfloat16)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(repeats + 1):
        for name, step in steps.items():
            found = block_ms(step)
            if i:  # the first turn warms up
                times[name].append(found)
    base = statistics.median(times["DynamicCache"])
    rows = []
    for name, own in times.items():
        middle = statistics.median(own)
        row = {"name": name, "least": min(own), "median": middle, "most": max(own)}
        rows.append({**row, "over_dynamic": middle / base})
        sys.stdout.write(
            f"{name:<22} {middle:8.2f} ms  ({min(own):.2f} to {max(own):.2f})"
            f"  {middle / base:6.3f} x DynamicCache\n"
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--budgets", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    args = parser.parse_args(arguments)
    rows = run(args.tokens, args.budgets, args.repeats)
    if args.out:
        facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
