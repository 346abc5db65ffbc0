"""Residual dropout for a model that has none: on the embedding, each attention and each MLP.

Random numbers are what dropout costs on a CPU. So one mask is drawn a step, a little wider than the
hidden size, and each of the 2 L + 1 places reads it shifted by `SHIFT` channels. The mask of a step
is seeded by (seed, step): no state to save.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from kvsmith.pipeline.training.windows import mix

SHIFT = 16  # channels; keeps the slices aligned to 32 bytes in bfloat16


class Dropout:
    """Forward hooks on `model` that multiply by slices of one mask; `remove` takes them off again.

    Args:
        model: the model in training.
        share: probability of a zero, in [0, 1); 0 installs nothing.
        seed: of the masks.
        dtype: of the activations.
    """

    def __init__(
        self, model: LlamaForCausalLM, share: float, seed: int, dtype: torch.dtype
    ) -> None:
        self._share, self._seed, self._dtype = share, seed, dtype
        self._width = model.config.hidden_size
        self._device = model.device
        self._mask = torch.ones(0, dtype=dtype)
        self.rows = slice(None)  # of the batch that are computed now
        places: list[nn.Module] = [model.model.embed_tokens] if share else []
        for layer in model.model.layers if share else ():
            places += [layer.self_attn, layer.mlp]
        self._places = places
        self._hooks = (
            [place.register_forward_hook(self._hook(i)) for i, place in enumerate(places)]
            if share
            else []
        )

    def draw(self, batch: int, length: int, step: int) -> None:
        """Fill the mask for a step of `batch` sequences of `length` tokens."""
        if not self._share:
            return
        shape = (batch, length, self._width + SHIFT * (len(self._places) - 1))
        if self._mask.shape != shape:
            self._mask = torch.empty(shape, dtype=self._dtype, device=self._device)
        draw = torch.Generator(device=self._device).manual_seed(mix(self._seed, 1, step))
        self._mask.bernoulli_(1 - self._share, generator=draw).div_(1 - self._share)

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, place: int) -> Any:
        begin, end = SHIFT * place, SHIFT * place + self._width

        def apply(module: nn.Module, _: Any, out: Any) -> Any:
            if not module.training:
                return out
            kept: Tensor = self._mask[self.rows, :, begin:end]
            if isinstance(out, tuple):
                return (out[0] * kept, *out[1:])
            return out * kept

        return apply
