"""Keys, values and their Fisher information from a model, batch by batch.

A tap hands each layer's keys (before RoPE) and values with the squared gradients of the loss to a
consumer, and keeps nothing: the activations of a batch live as long as its autograd graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvsmith.errors import explain
from kvsmith.hf import geometry, observe_kv
from kvsmith.pipeline.model import input_device
from kvsmith.pipeline.statistics.plan import TensorName

Consumer = Callable[[int, TensorName, Tensor, Tensor | None], None]
WORDS: dict[TensorName, str] = {"k": "keys", "v": "values"}


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """No weight gets a gradient, the activations behind the embedding do."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Module)

    def require(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return output.requires_grad_() if torch.is_grad_enabled() else output

    hook = embedding.register_forward_hook(require)
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        hook.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)


@dataclass
class Taps:
    """Runs batches and feeds a consumer.

    Attributes:
        model: in evaluation mode, within `frozen`.
        consume: called as (layer, "k" | "v", values [N, H, D] float32, squared gradients of that
            shape or None) once a batch for each tensor of each layer that owns its tokens.
        sinks: first tokens of every sequence that are left out.
        fisher: whether there is a backward pass.
    """

    model: PreTrainedModel
    consume: Consumer
    sinks: int
    fisher: bool
    _seen: set[tuple[int, str]] = field(default_factory=set)

    def run(self, tokens: Tensor) -> float:
        """Take one batch.

        The loss of a sequence is its mean cross-entropy, and sequences add up, so a gradient does
        not depend on the batch that its sequence is in.

        Args:
            tokens: [B, T] int64.

        Returns:
            The mean loss of the batch.

        Raises:
            ValueError: an activation, a gradient or the loss is not finite; names layer and tensor.
        """
        self._seen.clear()
        tokens = tokens.to(input_device(self.model))
        with torch.set_grad_enabled(self.fisher), observe_kv(self.model, self._observe):
            logits = self.model(input_ids=tokens, use_cache=False).logits
            targets = tokens[:, 1:].flatten().to(logits.device)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets)
            if not loss.isfinite():
                raise _not_finite("model", "loss", loss)
            if self.fisher:
                (loss * len(tokens)).backward()
        expected = {(i, n) for i in geometry(self.model.config).owners for n in WORDS}
        if missing := sorted(expected - self._seen):
            layer, name = missing[0]
            what = "gradients" if self.fisher else "activations"
            raise ValueError(explain(f"layer {layer}", f"{name} {what}", "observed", "none"))
        return float(loss.detach())

    def _observe(self, layer: int, k: Tensor, v: Tensor) -> None:
        tensors: tuple[tuple[TensorName, Tensor], ...] = (("k", k), ("v", v))
        for name, tensor in tensors:
            values = tensor.detach()
            _check_finite(values, layer, name, "activations")
            if self.fisher:
                tensor.register_hook(partial(self._take, layer, name, values))
            else:
                self._take(layer, name, values, None)

    def _take(self, layer: int, name: TensorName, values: Tensor, gradient: Tensor | None) -> None:
        fisher = None
        if gradient is not None:
            _check_finite(gradient, layer, name, "gradients")
            fisher = self._rows(gradient).square_()
        self.consume(layer, name, self._rows(values), fisher)
        self._seen.add((layer, name))

    def _rows(self, x: Tensor) -> Tensor:
        """[B, H, T, D] to [N, H, D] float32 without the sinks, a copy."""
        rows = x[:, :, self.sinks :].transpose(1, 2).flatten(0, 1)
        return rows.to(torch.float32, copy=True)


def _check_finite(x: Tensor, layer: int, name: TensorName, what: str) -> None:
    if not x.isfinite().all():
        raise _not_finite(f"layer {layer}", f"{what} of {WORDS[name]} ({name})", x)


def _not_finite(where: str, what: str, x: Tensor) -> ValueError:
    got = "NaN" if bool(x.isnan().any()) else "infinity"
    remedy = "Check the model's weights, or load it with model.dtype=float32."
    return ValueError(explain(where, what, "finite", got, remedy))
