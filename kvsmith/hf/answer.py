"""Evicting layers of modules that call torch's scaled_dot_product_attention themselves (Falcon).

Such a module asks its cache for all keys and values. What an evicting layer holds is not of that
form: KV heads keep different tokens, and a state is no token. So the keys that the cache hands out
answer the module's call: torch lets a tensor's class take a function over (`__torch_function__`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from kvsmith.errors import explain
from kvsmith.hf.masks import BiasMask, TensorMask

# Queries [B, Hq, T, D] after RoPE -> [B, Hq, T, Dv].
Answer = Callable[[torch.Tensor], torch.Tensor]


def can_answer(model: PreTrainedModel) -> bool:
    """Whether the model's attention modules call scaled_dot_product_attention."""
    config = model.config
    return config.model_type == "falcon" and config._attn_implementation == "sdpa"


def answering(k: torch.Tensor, answer: Answer) -> torch.Tensor:
    """Keys with the shape of `k` that answer scaled_dot_product_attention."""
    keys = k.view_as(k).as_subclass(_Answering)
    keys.answer = answer
    return keys


def mask_of(mask: Any) -> TensorMask | BiasMask:
    """The module's ready 4-D mask; numbers carry ALiBi."""
    assert isinstance(mask, torch.Tensor)
    return TensorMask(mask) if mask.dtype == torch.bool else BiasMask(mask)


class _Answering(torch.Tensor):
    answer: Answer

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.scaled_dot_product_attention:
                return args[1].answer(args[0])
            name = getattr(func, "__name__", str(func))
            if name in ("__get__", "__set__"):  # its shape, its dtype, its answer
                return func(*args, **(kwargs or {}))
        expected = "scaled_dot_product_attention, for a cache that evicts"
        remedy = "Leave output_attentions out."
        raise ValueError(explain("attention", "call", expected, name, remedy))
