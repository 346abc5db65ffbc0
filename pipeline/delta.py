"""What training changed: the weights that differ from those of the model it began with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from kvsmith.bundle import BaseModel, Delta
from kvsmith.errors import explain
from kvsmith.hf.weights import weights_hash, weights_in_memory
from kvsmith.layout import DTYPES
from kvsmith.pipeline.calibration import describe_model
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.model import ModelConfig, load_config, load_model
from kvsmith.pipeline.model_source import find_source
from kvsmith.pipeline.stage import read_json
from kvsmith.pipeline.training.result import RECORD
from kvsmith.strict import from_dict

AUTO = "auto"


def delta_of(
    trained: ModelConfig, base: str, shape: BaseModel, log: Run
) -> tuple[Delta, dict[str, Tensor]]:
    """Compare a trained model with the one that it was made from.

    Args:
        trained: the model.
        base: folder or hub name of the other, or `auto`: what training.json says.
        shape: of the trained model.
        log: says how much differs.

    Returns:
        The delta, and the weights that differ in any bit, in the dtype of the trained model.

    Raises:
        FileNotFoundError, ValueError: there is no such model, or it has another shape.
    """
    origin = _recorded(trained) if base == AUTO else None
    if origin is None:
        origin = replace(trained, path=base, name=None, revision=None, delta=None)
    dtype = _dtype(trained)
    after = weights_in_memory(load_model(_plain(trained))[0], trained.path)
    model = load_model(_plain(origin))[0]
    found, _ = describe_model(origin, model)
    shape.unshared.check(found, f"delta ({origin.path})")
    before = weights_in_memory(model, origin.path)
    if other := sorted(before.keys() ^ after.keys()):
        raise ValueError(explain(f"delta ({origin.path})", "weights", "the same", other[0]))
    changed = dict(_changed(before, after, DTYPES[dtype]))
    size = sum(weight.nbytes for weight in changed.values())
    log.say(f"delta: {len(changed)} of {len(after)} weights differ, {size:,} bytes")
    digest = weights_hash(before.items())
    return Delta(found.id, found.revision, digest, dtype), changed


def _changed(
    before: dict[str, Tensor], after: dict[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name, weight in after.items():
        old = before[name].detach().to(dtype)
        if old.shape != weight.shape or not torch.equal(_bits(old), _bits(weight.detach())):
            yield name, weight.detach()


def _bits(weight: Tensor) -> Tensor:
    return weight.contiguous().flatten().view(torch.uint8)


def _recorded(trained: ModelConfig) -> ModelConfig:
    """The model that training.json names."""
    path = Path(find_source(trained.path)) / RECORD
    remedy = "Give delta=FOLDER or a hub name."
    if not path.is_file():
        raise FileNotFoundError(explain(str(path), "file", "present", "nothing", remedy))
    model = read_json(path).get("model")
    if model is None:
        raise ValueError(explain(str(path), "model", "one it was trained from", "none", remedy))
    return from_dict(ModelConfig, model, f"{path}: model")


def _plain(cfg: ModelConfig) -> ModelConfig:
    """The same model whole on the CPU, as it is stored."""
    whole = replace(cfg, device="cpu", device_map=None, weight_bits=None)
    return replace(whole, dtype=_dtype(cfg))


def _dtype(cfg: ModelConfig) -> Literal["float16", "bfloat16", "float32"]:
    """What a checkpoint is stored in, as its configuration says."""
    config: Any = load_config(cfg)
    name = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(explain(cfg.path, "dtype", f"one of {', '.join(DTYPES)}", name))
    return cast(Literal["float16", "bfloat16", "float32"], name)
