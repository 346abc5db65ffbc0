"""H2O's scores as decoding gives them beside those of its published code, layer by layer.

    python -m kvsmith.pipeline.less.oracle [--less h2o_pct5] [--override model=tiny ...]

The published code scores tokens by the attention of a model that evicts nothing, which no decoder
has. Here the runtime's own store evicts held-out text by both: how many tokens do they keep in
common, and what does each lose?
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvsmith.eviction.store import EvictingStore
from kvsmith.hf import geometry
from kvsmith.kernels.attend.api import attend
from kvsmith.layout import evicting_layers
from kvsmith.pipeline.config import load, main_guard
from kvsmith.pipeline.data import token_blocks
from kvsmith.pipeline.less.record import Layer, replay, sweep
from kvsmith.pipeline.less.run import LONGEST, cache_spec
from kvsmith.pipeline.less.training import attention_error, projections
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.model import input_device, load_model, model_context
from kvsmith.pipeline.train import TrainConfig
from kvsmith.stores import make_store

ROWS = 256  # queries whose attention over all tokens is held at once
COLUMNS = ("layer", "error, decoding", "error, published", "kept by both %")


@dataclass(frozen=True)
class Pair:
    """One layer under both scores.

    Attributes:
        decoding, published: mean square after the output projection of what is lost.
        common: share of the tokens kept at the end that both keep.
    """

    decoding: float
    published: float
    common: float


def whole_lse(layer: Layer) -> Tensor:
    """[B, Hq, T] natural log of every query's softmax denominator over all earlier tokens."""
    k, T = layer.turn(layer.k, layer.rope), layer.q.shape[2]
    parts = []
    for start in range(0, T, ROWS):
        stop = min(start + ROWS, T)
        if layer.bias is None:
            rows = torch.arange(start, stop, device=k.device)[:, None]
            mask = (torch.arange(stop, device=k.device) <= rows)[None, None]
        else:
            mask = layer.bias.mask[:, :, start:stop, :stop]
        part = attend(
            layer.q[:, :, start:stop],
            k[:, :, :stop],
            layer.v[:, :, :stop],
            scale=layer.scores.scale,
            mask=mask,
            softcap=layer.scores.softcap,
        )
        parts.append(part.lse)
    return torch.cat(parts, 2)


def common(first: EvictingStore, second: EvictingStore) -> float:
    """Share of kept tokens that are the same, mean over rows and heads."""
    a, b = (s.kept() for s in (first, second))
    assert a is not None and b is not None
    same = (a.columns[..., None] == b.columns[..., None, :]) & (a.columns[..., None] >= 0)
    return float(same.any(-1).sum() / (a.columns >= 0).sum())


def compare(cfg: TrainConfig) -> dict[int, Pair]:
    """Both scores on the held sequences of a training, by layer.

    Raises:
        ValueError: the eviction does not fit, or the sequences are too short for it.
    """
    assert cfg.codec is not None and cfg.less is not None
    model, tokenizer = load_model(cfg.model)
    shape, spec = geometry(model.config), cache_spec(cfg.codec, cfg.eviction, model.config)
    length = cfg.less.length or min(model_context(model.config), LONGEST)
    ids = token_blocks(tokenizer, cfg.data, "calibration", cfg.less.held, length, seed=0)
    weights, layers = projections(model), evicting_layers(spec, shape)
    found: dict[int, Pair] = {}

    def visit(seen: Layer) -> None:
        if seen.index not in layers:
            return
        errors, stores = [], []
        for whole in (None, whole_lse(seen)):
            store = make_store(spec, shape, seen.index, {})
            assert isinstance(store, EvictingStore)
            gone = replay(seen, store, whole)
            if gone is not None:
                errors.append(attention_error(seen, gone, weights[seen.index].float()))
                stores.append(store)
        if len(stores) == 2:
            found[seen.index] = Pair(errors[0], errors[1], common(stores[0], stores[1]))

    sweep(model, ids.to(input_device(model)), visit)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and show."""
    parser = argparse.ArgumentParser(description="H2O's scores in decoding and as published.")
    parser.add_argument("--less", default="h2o_pct5")
    parser.add_argument("--override", nargs="+", default=[], metavar="NAME=VALUE")
    asked = parser.parse_args(arguments)

    def run() -> None:
        cfg = load(TrainConfig, "train", (f"less={asked.less}", *asked.override))
        rows = [
            (i, f"{p.decoding:.3g}", f"{p.published:.3g}", f"{100 * p.common:.0f}")
            for i, p in compare(cfg).items()
        ]
        with Run(None) as log:
            log.table("What eviction loses, by the scores of decoding and of full attention",
                      COLUMNS, rows)  # fmt: skip

    return main_guard(run)


if __name__ == "__main__":
    sys.exit(main())
