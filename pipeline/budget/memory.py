"""`kvsmith.fit`: from a loaded model and texts to a bundle, nothing left on the disk."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvsmith.bundle import Bundle
from kvsmith.errors import explain
from kvsmith.hf import geometry
from kvsmith.pipeline.budget.make import pose
from kvsmith.pipeline.budget.options import BudgetOptions
from kvsmith.pipeline.budget.run import request
from kvsmith.pipeline.budget.solve import solve
from kvsmith.pipeline.budget.trade import trade
from kvsmith.pipeline.calibrate import CalibrateConfig, calibrate
from kvsmith.pipeline.data import TextfileData
from kvsmith.pipeline.data.tokens import token_stream
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.model import ModelConfig, model_context
from kvsmith.pipeline.stage import Stop

SAMPLES = 64  # sequences at most
BATCH = 8


def fit_bundle(
    model: PreTrainedModel,
    texts: Sequence[str] | Tensor,
    target_bits: float | None,
    options: BudgetOptions,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Bundle:
    """The best bundle under a budget; arguments as of `kvsmith.fit`.

    Raises:
        ValueError: no budget, one that nothing fits, or too little text.
    """
    length = options.window(model_context(model.config))
    asked = request(options, target_bits, False, geometry(model.config))
    if asked is None or asked.budget is None:
        raise ValueError(explain("fit", "budget", "given as bits= or bytes=", "nothing"))
    tokens = _windows(model, texts, tokenizer, length)
    path = getattr(model.config, "_name_or_path", "") or str(model.config.model_type)
    cfg = CalibrateConfig(
        model=ModelConfig(path=path),
        data=TextfileData(path="texts"),
        samples=len(tokens),
        length=length,
        batch_size=BATCH,
        sinks=asked.choices.exact.sinks,
    )
    was_training = model.training
    model.eval()
    try:
        with tempfile.TemporaryDirectory() as place, Run(None, quiet=True) as log, Stop() as stop:
            folder = calibrate(replace(cfg, folder=place), {}, model, tokens, log, stop, asked)
            if asked.state is not None:
                _, bundle = trade(
                    options,
                    asked.choices,
                    asked.state,
                    asked.kept,
                    Path(folder),
                    model,
                    tokens[: options.windows],
                    None,
                    cfg.sensitivity,
                )
                return bundle
            problem = pose(
                options,
                asked.choices,
                Path(folder),
                tokens[: options.windows],
                None,
                model,
                cfg.sensitivity,
                log,
                stop,
            )
            found = solve(problem.loss, problem.price, asked.budget, asked.where)
            return problem.bundle(problem.point("fit", found), cfg.sensitivity)
    finally:
        model.train(was_training)


def _windows(
    model: PreTrainedModel,
    texts: Sequence[str] | Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
    length: int,
) -> Tensor:
    """[n, length] int64 from texts, or from rows of token ids."""
    if isinstance(texts, Tensor):
        stream = texts.flatten().to(torch.int64).cpu()
    else:
        reader = tokenizer or AutoTokenizer.from_pretrained(
            model.config._name_or_path, trust_remote_code=False
        )
        stream = token_stream(reader, texts, SAMPLES * length)
    count = min(len(stream) // length, SAMPLES)
    if not count:
        expected = f"at least {length} tokens"
        raise ValueError(explain("fit.texts", "text", expected, f"{len(stream)} tokens"))
    return stream[: count * length].view(count, length)
