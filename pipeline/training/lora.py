"""Low-rank terms instead of weights (LoRA, arXiv:2106.09685), by peft; folded in at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from kvsmith.errors import explain


def add_lora(
    model: PreTrainedModel, owner: Sequence[int], rank: int, seed: int
) -> Callable[[], object]:
    """Freeze a model and give its attention projections terms that learn.

    Args:
        model: changed in place.
        owner: for each layer the layer whose tokens it reads; readers' k and v get none.
        rank: of the terms.
        seed: of their first values.

    Returns:
        A function that adds the terms to the weights and takes them off the model.

    Raises:
        ValueError: peft is not installed.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        remedy = "Run `pip install peft`, or set uptrain.train=attention."
        where = "uptrain.train"
        raise ValueError(explain(where, "package peft", "installed", "nothing", remedy)) from error
    names = []
    for name, module in model.named_modules():
        layer = getattr(module, "layer_idx", None)
        if layer is not None:
            own = "qkvo" if owner[int(layer)] == int(layer) else "qo"
            names += [f"{name}.{p}_proj" for p in own if hasattr(module, f"{p}_proj")]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tuner = LoraModel(model, config, "default")
    fold: Callable[[], object] = tuner.merge_and_unload
    return fold
