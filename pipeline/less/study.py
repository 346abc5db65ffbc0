"""What states recover, over seeds: training, evicting and measuring in one command.

    python -m kvsmith.pipeline.less.study [--policies h2o lambda] [--budgets 5 10 2] [--seeds 0 1 2]
        [--states state ...] [--model tiny] [--folder runs/less_study] [--override NAME=VALUE ...]

A cell is a policy and a budget in percent of the context. Every cache of a cell decodes the same
held-out windows through `make_cache`; see `decoded`. A seed is of the initial features and of the
text that trains. What was measured is not measured again, so the command may be cut into parts
(`--policies h2o --budgets 5 --seeds 0`). `table.csv` and `table.json` hold all of it, with means
over seeds and standard errors. Overrides, as of train.py, hold for every training.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvsmith.eviction.policy import KeepAll
from kvsmith.pipeline.config import load, main_guard, output_path
from kvsmith.pipeline.data import token_blocks
from kvsmith.pipeline.evaluation.candidate import FULL, Candidate
from kvsmith.pipeline.evaluation.forced import compare, decode, own_losses, reference
from kvsmith.pipeline.evaluation.recovery import MORE, widened
from kvsmith.pipeline.less.result import cut, exported, read_trained
from kvsmith.pipeline.less.run import LONGEST, cache_spec, train_less
from kvsmith.pipeline.less.study_table import (
    ALONE,
    Cell,
    Found,
    Result,
    read_result,
    read_results,
    write_table,
)
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.model import load_model, model_context
from kvsmith.pipeline.stage import write_json
from kvsmith.pipeline.train import TrainConfig
from kvsmith.spec import CacheSpec

PREFILL = 128  # tokens read at once, and up to a block more
WINDOWS = 8  # held-out
HOME = 5  # percent: states trained for it are tried at the other budgets
TRANSFERRED = "state trained for 5 %"
# State -> how it is trained, beyond conf/less.
STATES: dict[str, tuple[str, ...]] = {
    "state": (),
    TRANSFERRED: (),
    "state, then all layers at once": ("less.joint_steps=24",),
    "state, ranks allotted": ("less.trained_ranks=[2,4,8,16,32]", "less.allot=true"),
    "paper's MLP": ("less.features.kind=mlp", "less.lr=0.005"),
}


class Study:
    """Cells of one model.

    Args:
        model: of conf/model.
        overrides: of every training.
        folder: of results and trainings.
        log: shows progress.
    """

    def __init__(self, model: str, overrides: Sequence[str], folder: Path, log: Run) -> None:
        self.overrides = (f"model={model}", *overrides)
        self.folder, self.log = folder, log
        any_cell = self._config(Cell("h2o", HOME))
        self.data, self.model_cfg = any_cell.data, any_cell.model
        self.model, self.tokenizer = load_model(self.model_cfg)

    def run(self, cell: Cell, seeds: Sequence[int], states: Sequence[str]) -> None:
        """Measure the caches of a cell that were not yet measured."""
        path = self.folder / cell.file
        found = read_result(path).found if path.is_file() else {}
        makers = self._makers(cell, seeds, states)
        missing = [key for key in makers if key[1] not in found.get(key[0], {})]
        if not missing:
            return
        self.log.say(f"{cell.policy} at {cell.percent} %")
        context = min(model_context(self.model.config), LONGEST)
        ids = token_blocks(self.tokenizer, self.data, "heldout", WINDOWS, context, 0)
        first = PREFILL + self._spec(cell).codec.block_size  # scored by all, whatever their prefill
        full = reference(self.model, FULL.cache(self.model), ids, first, PREFILL)
        nll = tuple(own_losses(full, ids, first).nll.tolist())
        found = {FULL.name: {"": Found(nll, 0.0, None, None)}, **found}
        for name, seed in missing:
            began = time.process_time()
            one = makers[name, seed]()
            seconds = None if one.role == "baseline" else time.process_time() - began
            own, kld, nbytes = decoded(self.model, one, ids, full, first)
            made = Found(tuple(own.tolist()), kld, nbytes, seconds)
            found.setdefault(name, {})[seed] = made
            self.log.say(f"  {name} {seed}: {statistics.mean(made.nll):.4f} nats a token")
            write_json(path, Result(cell, found))

    def _makers(
        self, cell: Cell, seeds: Sequence[int], states: Sequence[str]
    ) -> dict[tuple[str, str], Callable[[], Candidate]]:
        """Caches by name and seed; making one with a state trains it, unless that was done."""
        spec, wider = self._spec(cell), widened(self._spec(cell))
        made: dict[tuple[str, str], Callable[[], Candidate]] = {
            (ALONE, ""): lambda: Candidate("alone", "baseline", "", spec, {}),
            (f"{MORE} more tokens", ""): lambda: Candidate("wider", "baseline", "", wider, {}),
        }
        for seed, name in itertools.product(seeds, states):
            percent = HOME if name == TRANSFERRED else cell.percent
            if name == TRANSFERRED and cell.percent == HOME:
                continue
            cfg = self._config(replace(cell, percent=percent), (f"less.seed={seed}", *STATES[name]))
            made[name, str(seed)] = partial(self._with_state, spec, cfg)
        return made

    def _with_state(self, spec: CacheSpec, cfg: TrainConfig) -> Candidate:
        assert cfg.less is not None and cfg.codec is not None
        trained = train_less(
            cfg.less, cfg.model, cfg.data, cfg.codec, cfg.eviction,
            self.folder / "trained", self.folder / "work", cfg.logger,
        )  # fmt: skip
        assert trained is not None
        record, tensors = read_trained(trained)
        whole = replace(spec, less=exported(cfg.less, record.ranks))
        features = cut(whole, record.source.base_model, tensors)
        return Candidate("state", "bundle", str(trained), whole, features)

    def _config(self, cell: Cell, more: tuple[str, ...] = ()) -> TrainConfig:
        name = f"less={cell.policy}_pct{cell.percent}"
        return load(TrainConfig, "train", (name, *self.overrides, *more))

    def _spec(self, cell: Cell) -> CacheSpec:
        cfg = self._config(cell)
        assert cfg.codec is not None
        return cache_spec(cfg.codec, cfg.eviction, self.model.config)


@torch.inference_mode()
def decoded(
    model: PreTrainedModel, one: Candidate, ids: Tensor, full: Tensor, first: int
) -> tuple[Tensor, float, int]:
    """Decode windows through an evicting cache, in the steps in which tokens leave.

    The first pass is cut so that every later chunk of a block ends where a block leaves: between
    two evictions tokens see what they would see one at a time.

    Args:
        model: the model.
        one: the cache.
        ids: [B, T] int64.
        full: [B, T - first - 1, vocab] log-probabilities of full precision.
        first: tokens before the first scored prediction.

    Returns:
        nll [B] float64, divergence a token, and bytes of one row's cache.
    """
    spec = one.spec
    assert spec is not None and not isinstance(spec.eviction, KeepAll)
    block, cache = spec.codec.block_size, one.cache(model)
    prefill = PREFILL + spec.eviction.budget % block
    skip, nlls, klds = first - prefill, [], []
    done = 0
    for logp in decode(model, cache, ids[:, :-1], prefill, block):
        start, done = done, done + logp.shape[1]
        if done <= skip:
            continue
        new = logp[:, max(skip - start, 0) :]
        span = slice(max(start - skip, 0), done - skip)
        targets = ids[:, first + 1 :][:, span]
        nll, kld, _ = compare(new, full[:, span], targets)
        nlls.append(nll.double())
        klds.append(kld.double())
    nbytes = cache.bytes()
    held = (nbytes.total - nbytes.parameters - nbytes.positions) // len(ids)
    return torch.cat(nlls, 1).mean(1), float(torch.cat(klds, 1).mean()), held


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells that are asked for; write the table of all that are finished."""
    parser = argparse.ArgumentParser(description="What states recover, over seeds.")
    parser.add_argument("--policies", nargs="+", default=["h2o", "lambda"])
    parser.add_argument("--budgets", nargs="+", type=int, default=[5, 10, 2], metavar="PERCENT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--states", nargs="+", choices=list(STATES), default=list(STATES))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--folder", default="runs/less_study")
    parser.add_argument("--override", nargs="+", default=[], metavar="NAME=VALUE")
    asked = parser.parse_args(arguments)

    def run() -> None:
        folder = output_path(asked.folder)
        with Run(folder) as log:
            study = Study(asked.model, asked.override, folder, log)
            for policy, percent in itertools.product(asked.policies, asked.budgets):
                study.run(Cell(policy, percent), asked.seeds, asked.states)
            write_table(folder, read_results(folder), log)

    return main_guard(run)


if __name__ == "__main__":
    sys.exit(main())
