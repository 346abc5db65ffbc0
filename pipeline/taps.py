"""Keys, values and their Fisher information from a model, batch by batch.

A tap hands each layer's keys (before RoPE) and values with the squared gradients of the loss to a
consumer, a sequence at a time, and keeps nothing: the activations of a batch live as long as its
autograd graph. `memory.py` makes that graph small; the loss is taken in pieces, so that logits of a
whole sequence never exist.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvsmith.errors import explain
from kvsmith.hf import geometry, observe_kv
from kvsmith.pipeline.memory import recomputed, spilled
from kvsmith.pipeline.model import input_device
from kvsmith.pipeline.statistics.plan import TensorName

Consumer = Callable[[int, TensorName, Tensor, Tensor | None], None]
WORDS: dict[TensorName, str] = {"k": "keys", "v": "values"}
LOGITS = 2**23  # of one piece of the loss


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
            shape or None), once a sequence for each tensor of each layer that owns its tokens,
            sequences in order; everything is on the layer's own device.
        sinks: first tokens of every sequence that are left out.
        fisher: whether there is a backward pass.
        recompute: keep only what goes into each layer and compute its inside again when the
            backward pass needs it. Bit for bit the same result.
        spill: folder for what goes into the layers, with `recompute` on a CPU; None keeps it in
            memory.
        breathe: called between layers; may raise to leave.
    """

    model: PreTrainedModel
    consume: Consumer
    sinks: int
    fisher: bool
    recompute: bool = False
    spill: Path | None = None
    breathe: Callable[[], None] = lambda: None
    _seen: set[tuple[int, str]] = field(default_factory=set)
    _values: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    _backward: bool = False

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
        self._values.clear()
        self._backward = False
        tokens = tokens.to(input_device(self.model))
        with torch.set_grad_enabled(self.fisher), observe_kv(self.model, self._observe):
            with ExitStack() as stack:
                if self.fisher and self.recompute:
                    stack.enter_context(recomputed(self.model))
                    stack.enter_context(spilled(self.model, self.spill))
                head = Head(self.model)
                hidden = head.run(tokens)
            loss, gradient = self._loss(head, hidden, tokens)
            if self.fisher:
                self._backward = True
                hidden.backward(gradient)
        expected = {(i, n) for i in geometry(self.model.config).owners for n in WORDS}
        if missing := sorted(expected - self._seen):
            layer, name = missing[0]
            what = "gradients" if self.fisher else "activations"
            raise ValueError(explain(f"layer {layer}", f"{name} {what}", "observed", "none"))
        return loss

    def _loss(self, head: Head, hidden: Tensor, tokens: Tensor) -> tuple[float, Tensor]:
        """Mean loss of the batch, and the gradient of the sequences' sum to `hidden`."""
        gradient, total = torch.zeros_like(hidden), 0.0
        scored = tokens.shape[1] - 1
        step = max(1, LOGITS // self.model.config.get_text_config(decoder=True).vocab_size)
        for row in range(len(tokens)):
            for start in range(0, scored, step):
                end = min(start + step, scored)
                piece = hidden[row : row + 1, start:end].detach().requires_grad_(self.fisher)
                logits = head.logits(piece, tokens[row : row + 1, start:end])[0].float()
                target = tokens[row, start + 1 : end + 1].to(logits.device)
                loss = F.cross_entropy(logits, target, reduction="sum") / scored
                if not loss.isfinite():
                    raise _not_finite("model", "loss", loss)
                if self.fisher:
                    loss.backward()
                    assert piece.grad is not None
                    gradient[row, start:end] = piece.grad[0]
                total += float(loss.detach())
        return total / len(tokens), gradient

    def _observe(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.breathe()
        tensors: tuple[tuple[TensorName, Tensor], ...] = (("k", k), ("v", v))
        for name, tensor in tensors:
            values = tensor.detach()
            if self._backward or not (self.fisher and self.recompute):
                self._values[layer, name] = values
            if self._backward:  # the layer is computed again; it was seen before
                continue
            _check_finite(values, layer, name, "activations")
            if self.fisher:
                tensor.register_hook(partial(self._take, layer, name))
            else:
                self._take(layer, name, None)

    def _take(self, layer: int, name: TensorName, gradient: Tensor | None) -> None:
        self.breathe()
        values = self._values.pop((layer, name))
        if gradient is not None:
            _check_finite(gradient, layer, name, "gradients")
        for row, one in enumerate(values):
            fisher = None if gradient is None else self._rows(gradient[row]).square_()
            self.consume(layer, name, self._rows(one), fisher)
        self._seen.add((layer, name))

    def _rows(self, x: Tensor) -> Tensor:
        """[H, T, D] to [N, H, D] float32 without the sinks, a copy."""
        return x[:, self.sinks :].transpose(0, 1).to(torch.float32, copy=True)


class Head:
    """A model in two parts: its decoder, and what makes logits of the decoder's result.

    The second part is the model's own forward pass with the decoder's result put in its place, so
    that caps, scales and biases of every family are as they are.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._output: Any = None

    def run(self, tokens: Tensor) -> Tensor:
        """[B, T, width] of the decoder, for [B, T] tokens."""

        def first(decoder: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._output = decoder(*args, **kwargs)
            return _with_hidden(self._output, self._output.last_hidden_state[:, :1].detach())

        self._call(tokens, first)
        hidden: Tensor = self._output.last_hidden_state
        self._output = _with_hidden(self._output, hidden.detach()[:, :0])
        return hidden

    def logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """[1, N, vocabulary] of [1, N, width]."""
        output = _with_hidden(self._output, hidden)
        logits: Tensor = self._call(tokens, lambda *_args, **_kwargs: output).logits
        return logits

    def _call(self, tokens: Tensor, instead: Callable[..., Any]) -> Any:
        decoder = self.model.get_decoder()
        forward, own = decoder.forward, vars(decoder).get("forward")
        decoder.forward = partial(instead, forward)
        try:
            return self.model(input_ids=tokens, use_cache=False)
        finally:
            del decoder.forward
            if own is not None:  # accelerate's
                decoder.forward = own


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    changed = copy.copy(output)
    changed.last_hidden_state = hidden
    return changed


def _check_finite(x: Tensor, layer: int, name: TensorName, what: str) -> None:
    if not x.isfinite().all():
        raise _not_finite(f"layer {layer}", f"{what} of {WORDS[name]} ({name})", x)


def _not_finite(where: str, what: str, x: Tensor) -> ValueError:
    got = "NaN" if bool(x.isnan().any()) else "infinity"
    remedy = "Check the model's weights, or load it with model.dtype=float32."
    return ValueError(explain(where, what, "finite", got, remedy))
