"""Held-out loss of a model: non-overlapping windows, each read from its first token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


def heldout_loss(model: PreTrainedModel, windows: Tensor, batch: int = 8) -> float:
    """Mean negative log-likelihood in nats of every token but the first of each window.

    Args:
        model: any causal language model.
        windows: [N, T] int64.
        batch: windows in a forward pass.

    Returns:
        The mean; its exponential is the perplexity.
    """
    total = 0.0
    training = model.training
    model.eval()
    with torch.no_grad():
        for part in windows.split(batch):
            part = part.to(model.device)
            logits = model(input_ids=part[:, :-1], use_cache=False).logits.float()
            total += float(
                F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
            )
    model.train(training)
    return total / (windows.shape[0] * (windows.shape[1] - 1))
