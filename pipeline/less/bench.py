"""What a state costs in decoding: time of a token, and the state's share of it.

    python -m kvsmith.pipeline.less.bench [--less h2o_pct5 lambda_pct5] [--rows 1] [--prompt 512]
        [--tokens 64] [--repeats 3] [--override model=tiny ...]

One token at a time through `make_cache`, after a prompt that fills the budget. Features are random:
time does not depend on them. Times are the process's, so that other processes do not count, and the
median over repeats; on a GPU they are the clock's. The state's share is what its two operations
take within the same run: `partial`, which answers queries, and `fold`, which takes evicted tokens
in.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from kvsmith.hf import geometry, make_cache
from kvsmith.layout import less_parameters
from kvsmith.less.state import State
from kvsmith.pipeline.config import load, main_guard
from kvsmith.pipeline.less.run import cache_spec
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.model import input_device, load_model
from kvsmith.pipeline.train import TrainConfig
from kvsmith.spec import CacheSpec

COLUMNS = ("cache", "ms a token", "beside full", "answering %", "folding %")


def clock(device: torch.device) -> float:
    """Seconds: of this process, or on a GPU when it has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


@contextmanager
def watched(device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds spent in `State.partial` and `State.fold`."""
    spent = {"partial": 0.0, "fold": 0.0}
    plain = {name: getattr(State, name) for name in spent}

    def timed(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            began = clock(device)
            out = plain[name](*args)
            spent[name] += clock(device) - began
            return out

        return call

    try:
        for name in spent:
            setattr(State, name, timed(name))
        yield spent
    finally:
        for name, method in plain.items():
            setattr(State, name, method)


@torch.inference_mode()
def decode(
    model: PreTrainedModel, cache: Cache, ids: Tensor, prompt: int
) -> tuple[float, dict[str, float]]:
    """Seconds of decoding ids [B, T] after a prompt, and of the state's operations in them."""
    device = input_device(model)
    model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    with watched(device) as spent:
        began = clock(device)
        for token in ids[:, prompt:].split(1, dim=1):
            model(input_ids=token, past_key_values=cache, use_cache=True)
        return clock(device) - began, spent


def random_features(model: PreTrainedModel, spec: CacheSpec) -> dict[str, Tensor]:
    """Features of the shapes that training would find."""
    draw = torch.Generator().manual_seed(0)
    shapes = less_parameters(spec, geometry(model.config))
    return {n: 0.1 * torch.randn(info.shape, generator=draw) for n, info in shapes.items()}


def measure(asked: argparse.Namespace, log: Run) -> list[tuple[str, ...]]:
    """One row a cache."""
    names = list(asked.less)
    configs = {n: load(TrainConfig, "train", (f"less={n}", *asked.override)) for n in names}
    model, _ = load_model(configs[names[0]].model)
    caches: dict[str, Callable[[], Cache]] = {
        "full precision": lambda: DynamicCache(config=model.config)
    }
    for name, cfg in configs.items():
        assert cfg.codec is not None and cfg.less is not None
        plain = cache_spec(cfg.codec, cfg.eviction, model.config)
        whole = replace(plain, less=cfg.less.spec())
        own = random_features(model, whole)
        caches[f"{name}, eviction alone"] = lambda plain=plain: make_cache(model, plain)  # type: ignore[misc]
        caches[name] = lambda whole=whole, own=own: make_cache(model, whole, own)  # type: ignore[misc]
    shape = (asked.rows, asked.prompt + asked.tokens)
    ids = torch.randint(3, model.config.vocab_size, shape, device=input_device(model))
    runs: dict[str, list[tuple[float, dict[str, float]]]] = {name: [] for name in caches}
    for number in range(asked.repeats):
        for name, make in caches.items():  # in turn, so that a slow moment meets all
            runs[name].append(decode(model, make(), ids, asked.prompt))
        log.say(f"repeat {number + 1} of {asked.repeats}")
    full = statistics.median(seconds for seconds, _ in runs["full precision"])
    return [row(name, found, full, asked.tokens) for name, found in runs.items()]


def row(
    name: str, found: list[tuple[float, dict[str, float]]], full: float, tokens: int
) -> tuple[str, ...]:
    """Cells as in COLUMNS."""
    middle = statistics.median(seconds for seconds, _ in found)
    shares = {
        part: 100 * statistics.median(spent[part] / seconds for seconds, spent in found)
        for part in ("partial", "fold")
    }
    cells = (f"{1e3 * middle / tokens:.2f}", f"{middle / full:.2f}")
    return (name, *cells, f"{shares['partial']:.1f}", f"{shares['fold']:.1f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and show."""
    parser = argparse.ArgumentParser(description="What a state costs in decoding.")
    parser.add_argument("--less", nargs="+", default=["h2o_pct5", "lambda_pct5"])
    parser.add_argument("--override", nargs="+", default=[], metavar="NAME=VALUE")
    for name, value in (("rows", 1), ("prompt", 512), ("tokens", 64), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args(arguments)

    def run() -> None:
        with Run(None) as log:
            log.table("Decoding, one token at a time", COLUMNS, measure(asked, log))

    return main_guard(run)


if __name__ == "__main__":
    sys.exit(main())
