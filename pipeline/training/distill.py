"""The loss of a shared model beside the model it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from kvsmith.errors import explain


@dataclass(frozen=True)
class Mix:
    """Weights of the parts of the loss.

    Args:
        logits: KL divergence of the next token's distribution from the teacher's, nats.
        hidden: squared difference of the residual stream after each layer, relative to its own.
        text: cross-entropy of the text, nats.
    """

    logits: float = 1.0
    hidden: float = 0.0
    text: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(explain(f"uptrain.mix.{name}", "weight", "at least 0", value))
        if not any(vars(self).values()):
            raise ValueError(explain("uptrain.mix", "weights", "one above 0", "none"))


def distillation(
    student: PreTrainedModel, teacher: PreTrainedModel | None, mix: Mix, bfloat16: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss function of inputs and targets [B, T].

    Args:
        student: gets gradients.
        teacher: does not; None where `mix` needs none.
        mix: what the loss is made of.
        bfloat16: autocast.
    """

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        options = {"input_ids": inputs, "use_cache": False, "output_hidden_states": mix.hidden > 0}
        with torch.autocast(student.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            made = student(**options)
            if teacher is not None:
                with torch.no_grad():
                    right = teacher(**options)
        logits = made.logits.float().flatten(0, 1)
        total = logits.new_zeros(())
        if mix.text:
            total = total + mix.text * F.cross_entropy(logits, targets.flatten())
        if mix.logits:
            wanted = right.logits.float().flatten(0, 1).log_softmax(-1)
            kl = F.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True)
            total = total + mix.logits * kl
        if mix.hidden:
            pairs = list(zip(made.hidden_states[1:], right.hidden_states[1:], strict=True))
            far = [F.mse_loss(a.float(), b.float()) / b.float().square().mean() for a, b in pairs]
            total = total + mix.hidden * torch.stack(far).mean()
        return total

    return loss
