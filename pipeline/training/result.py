"""The model folder that a training leaves: weights, tokenizer, record, card; whole or absent."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvsmith.errors import explain
from kvsmith.pipeline.log import peak_memory
from kvsmith.pipeline.model import ModelConfig, load_model, quiet
from kvsmith.pipeline.training.card import model_card
from kvsmith.pipeline.training.heldout import heldout_loss

RECORD = "training.json"
SAMPLE_TOKENS = 64


def is_finished(output: Path, identity: str, overwrite: bool) -> bool:
    """Whether a model folder is the result of a run.

    Args:
        output: the folder; may not exist.
        identity: hash of the run's configuration.
        overwrite: whether another result may be replaced.

    Returns:
        True if there is nothing left to do.

    Raises:
        ValueError: something else is there and `overwrite` is false.
    """
    if not output.exists():
        return False
    record = output / RECORD
    found = "something else"
    if record.is_file():
        found = str(json.loads(record.read_text("utf-8")).get("identity"))
    if found == identity:
        return True
    if not overwrite:
        remedy = "Give another output=..., or overwrite=true."
        expected = f"free or of run {identity}"
        raise ValueError(explain("output", str(output), expected, found, remedy))
    return False


def write_result(
    output: Path,
    net: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    heldout: Tensor,
    prompt: str,
    record: dict[str, Any],
    log: Path,
    card: Callable[[str, dict[str, Any]], str] = model_card,
) -> None:
    """Write the folder beside its target, measure what was written, move it into place.

    Args:
        output: target; an older folder there is replaced.
        net: the trained model; becomes bfloat16.
        tokenizer: its tokenizer.
        heldout: [N, T] int64 windows that perplexity is measured on.
        prompt: whose greedy continuation is recorded.
        record: facts of the training; completed here and written as `training.json`.
        log: file that becomes `training_log.jsonl`.
        card: writes README.md from the folder's name and the record.
    """
    quiet()
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    net.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    model, _ = load_model(ModelConfig(path=str(temporary), device="cpu"))
    record = {**record, **measure(model, tokenizer, heldout, prompt)}
    (temporary / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", "utf-8")
    (temporary / "README.md").write_text(card(output.name, record), "utf-8")
    shutil.copyfile(log, temporary / "training_log.jsonl")
    old = output.with_name(f".{output.name}.old.{os.getpid()}")
    if output.exists():
        os.replace(output, old)
    os.replace(temporary, output)
    shutil.rmtree(old, ignore_errors=True)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, heldout: Tensor, prompt: str
) -> dict[str, Any]:
    """What the record says about the finished model: held-out loss and a greedy continuation."""
    loss = heldout_loss(model, heldout)
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=SAMPLE_TOKENS, do_sample=False)
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    windows, length = heldout.shape
    return {
        "heldout": {
            "windows": windows,
            "length": length,
            "loss": loss,
            "perplexity": math.exp(loss),
        },
        "sample": {"prompt": prompt, "continuation": str(text)},
        "peak_memory_bytes": peak_memory(),
        "torch": torch.__version__,
    }
