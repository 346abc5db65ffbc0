"""Teacher-forced decoding through a cache, and its losses against full precision.

Protocol: windows do not overlap. The first `prefill` tokens of a window go through the model in
one forward pass, the rest in chunks of `chunk` tokens. Scored are the tokens after the prefill, so
every scored prediction has read the compressed past. A cache encodes before it attends: tokens of a
chunk attend exactly to their own chunk, and to earlier tokens exactly only where the dense window
is longer than the chunk. With chunks as long as the longest window (32) every codec is treated
alike, and worse than in decoding token by token (chunk 1), which sees the newest tokens dense.

    nll = -log p(next token),   KLD = sum_v p_full(v) * (log p_full(v) - log p(v)),   top-1 = argmax
    p == argmax p_full
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel


@dataclass(frozen=True)
class Losses:
    """What one candidate lost on some windows.

    Attributes:
        nll: [B] float64, negative log-likelihood of the scored tokens, mean a window, nats.
        kld: [B, S] float32, divergence of every scored position from full precision, nats.
        same: [B] float64, share of positions with the same most likely token.
    """

    nll: Tensor
    kld: Tensor
    same: Tensor

    @staticmethod
    def join(parts: list[Losses]) -> Losses:
        """The losses of several batches as one."""
        return Losses(
            *(torch.cat([getattr(p, name) for p in parts]) for name in ("nll", "kld", "same"))
        )


@torch.inference_mode()
def decode(
    model: PreTrainedModel, cache: Cache, ids: Tensor, prefill: int, chunk: int
) -> Iterator[Tensor]:
    """Feed `ids` through `model` and `cache` as the module says.

    Args:
        model: a causal language model in evaluation mode.
        cache: an empty cache.
        ids: [B, T] int64, token ids.
        prefill: tokens of the first forward pass; their predictions are not returned.
        chunk: tokens of each later pass.

    Yields:
        [B, S, vocab] float32, log-probabilities after each token of the chunk, S <= chunk.
    """
    model(input_ids=ids[:, :prefill], past_key_values=cache, use_cache=True, logits_to_keep=1)
    for piece in ids[:, prefill:].split(chunk, dim=1):
        logits = model(input_ids=piece, past_key_values=cache, use_cache=True).logits
        yield logits.float().log_softmax(-1)


def reference(
    model: PreTrainedModel, cache: Cache, ids: Tensor, prefill: int, chunk: int
) -> Tensor:
    """Log-probabilities of full precision at every scored position; arguments as in `decode`.

    Returns:
        [B, T - prefill - 1, vocab] float32.
    """
    return torch.cat(list(decode(model, cache, ids[:, :-1], prefill, chunk)), dim=1)


def losses(
    model: PreTrainedModel, cache: Cache, ids: Tensor, full: Tensor, prefill: int, chunk: int
) -> Losses:
    """Decode through a candidate's cache and compare with full precision, chunk by chunk.

    Args:
        model, prefill, chunk: as in `decode`.
        cache: the candidate's empty cache.
        ids: [B, T] int64.
        full: what `reference` returned for the same arguments.

    Returns:
        Losses of the B windows.
    """
    parts, start = [], 0
    for logp in decode(model, cache, ids[:, :-1], prefill, chunk):
        stop = start + logp.shape[1]
        targets = ids[:, prefill + 1 + start : prefill + 1 + stop]
        parts.append(compare(logp, full[:, start:stop], targets))
        start = stop
    nll, kld, same = (torch.cat(p, dim=1) for p in zip(*parts, strict=True))
    return Losses(nll.double().mean(1).cpu(), kld.cpu(), same.double().mean(1).cpu())


def own_losses(full: Tensor, ids: Tensor, prefill: int) -> Losses:
    """The losses of full precision itself; arguments as in `losses`."""
    targets = ids[:, prefill + 1 :]
    nll = -full.gather(-1, targets[..., None])[..., 0]
    return Losses(
        nll.double().mean(1).cpu(),
        torch.zeros_like(nll).cpu(),
        torch.ones(len(ids), dtype=torch.float64),
    )


@torch.inference_mode()
def compare(logp: Tensor, full: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk against full precision.

    Args:
        logp: [B, S, vocab] float32, log-probabilities of the candidate.
        full: [B, S, vocab] float32, of full precision.
        targets: [B, S] int64, the tokens that follow.

    Returns:
        nll, kld and same, each [B, S].
    """
    nll = -logp.gather(-1, targets[..., None])[..., 0]
    # Rounding leaves up to about 1e-7 of either sign where the two are equal.
    kld = (full.exp() * (full - logp)).sum(-1).clamp(min=0)
    return nll, kld, logp.argmax(-1) == full.argmax(-1)
