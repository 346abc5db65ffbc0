"""Greedy agreement: how long free-running generation stays with full precision.

After the first different token the two texts go their own ways, so the share of equal tokens mostly
says how late that was; the length to the first difference says it directly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvsmith.pipeline.evaluation.fidelity import spread


@dataclass(frozen=True)
class Agreement:
    """Greedy continuations against those of full precision.

    Attributes:
        prompts: continuations compared.
        new_tokens: tokens of each.
        match: share of positions with the same token.
        match_se: its standard error over prompts; None with one.
        length: mean number of tokens before the first difference, at most new_tokens.
        length_se: its standard error.
        identical: continuations without any difference.
    """

    prompts: int
    new_tokens: int
    match: float
    match_se: float | None
    length: float
    length_se: float | None
    identical: int


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    new_cache: Callable[[], Cache],
    prompts: Tensor,
    new_tokens: int,
    batch: int,
) -> Tensor:
    """Continue `prompts` greedily through `model.generate`, each batch with an empty cache.

    Args:
        model: a causal language model in evaluation mode.
        new_cache: makes an empty cache.
        prompts: [B, T] int64, all of one length.
        new_tokens: exactly so many are generated; the end-of-text token is held back.
        batch: prompts continued side by side.

    Returns:
        [B, new_tokens] int64 on the CPU.
    """
    eos = model.generation_config.eos_token_id
    parts = []
    for rows in prompts.split(batch):
        out = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            past_key_values=new_cache(),
            do_sample=False,
            num_beams=1,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=eos[0] if isinstance(eos, list) else eos,
        )
        assert isinstance(out, Tensor)
        parts.append(out[:, prompts.shape[1] :].cpu())
    return torch.cat(parts)


def agreement(full: Tensor, candidate: Tensor) -> Agreement:
    """Compare continuations, both [B, T] int64."""
    same = full == candidate
    until = same.long().cumprod(1).sum(1)
    match, length = spread(same.double().mean(1).tolist()), spread(until.double().tolist())
    return Agreement(
        prompts=same.shape[0],
        new_tokens=same.shape[1],
        match=match.mean,
        match_se=match.se,
        length=length.mean,
        length_se=length.se,
        identical=int((until == same.shape[1]).sum()),
    )
