"""One file that holds everything a run needs to continue: weights, moments, and progress.

A safetensors file with tensors `model.<name>`, `exp_avg.<name>`, `exp_avg_sq.<name>` and JSON in
its header. The data order and the dropout masks are functions of (seed, step), so the step is the
data position and there is no generator state.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW

from kvsmith.errors import explain
from kvsmith.pipeline.training.sharding import spread, whole
from kvsmith.strict import from_dict, to_dict

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Done:
    """What a run has done so far, over all its starts.

    Args:
        steps: optimizer steps.
        seconds: wall time of training.
        cpu_seconds: processor time of all threads.
    """

    steps: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def save_checkpoint(
    path: Path | None, model: nn.Module, optimizer: AdamW, done: Done, identity: str
) -> None:
    """Write the checkpoint whole or not at all.

    Args:
        path: target; a file there is replaced in one move. None only takes part in putting together
            what is spread over processes.
        model, optimizer: their current state.
        done: progress.
        identity: hash of the run's configuration.
    """
    tensors: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        tensors[f"model.{name}"] = whole(weight.detach()).contiguous()
        for moment in MOMENTS:
            if moment in optimizer.state[weight]:
                tensors[f"{moment}.{name}"] = whole(optimizer.state[weight][moment])
    if path is None:
        return
    header = {"kvsmith": json.dumps({"done": to_dict(done), "identity": identity})}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, temporary, metadata=header)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path, model: nn.Module, optimizer: AdamW, identity: str) -> Done:
    """Put the model and the optimizer back where a checkpoint left them.

    Args:
        path: may not exist.
        model, optimizer: changed in place.
        identity: hash that the checkpoint must carry.

    Returns:
        Progress; nothing without a checkpoint.

    Raises:
        ValueError: the file is damaged or of another run.
    """
    if not path.is_file():
        return Done()
    remedy = "Delete it to start from the beginning."
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["kvsmith"])
            if header["identity"] != identity:
                raise ValueError(
                    explain(
                        str(path), "checkpoint", f"of run {identity}", header["identity"], remedy
                    )
                )
            done = from_dict(Done, header["done"], "done")
            _restore(file, model, optimizer, done.steps)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(
            explain(str(path), "file", "a whole checkpoint", f"({error})", remedy)
        ) from error
    return done


def _restore(file: safe_open, model: nn.Module, optimizer: AdamW, step: int) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(spread(file.get_tensor(f"model.{name}"), weight))
            if not weight.requires_grad:
                continue
            state = {
                moment: spread(file.get_tensor(f"{moment}.{name}"), weight) for moment in MOMENTS
            }
            optimizer.state[weight] = {"step": torch.tensor(float(step)), **state}
