"""Verbatim recall: a random string planted in text must be copied when its beginning returns.

The text and the planted keys (`planted.py`) are read in one forward pass. Then the beginning of a
key and its rest follow in a second one, which sees the planted key only through the cache. Scored
are the tokens of the rest: their negative log-likelihood, and whether the most likely token is the
right one. A row is exact if all of them are, which is when free-running greedy generation would
copy the whole rest.

Small models copy only in part. So every key is also scored in a text where another key stands; the
nats a token that planting the right one saves, the gain, are what the cache kept of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvsmith.pipeline.evaluation.fidelity import Difference, spread
from kvsmith.pipeline.evaluation.planted import Planted


@dataclass(frozen=True)
class Recall:
    """Figures of one candidate.

    Attributes:
        keys: planted strings.
        tokens: tokens to be copied of each.
        nll: mean negative log-likelihood of those tokens, nats.
        gain: by how much it is lower than where another key is planted, nats a token.
        gain_se: its standard error over keys; None with one.
        correct: share of tokens that are the most likely one.
        exact: share of keys with every token correct.
        lengths: tokens of the texts.
        depths: shares of a text before the key.
        grid: gain by length (in the order of `lengths`) and depth.
        exact_grid: share of exact keys by length and depth.
    """

    keys: int
    tokens: int
    nll: float
    gain: float
    gain_se: float | None
    correct: float
    exact: float
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    grid: tuple[tuple[float, ...], ...]
    exact_grid: tuple[tuple[float, ...], ...]


def recall(
    model: PreTrainedModel,
    new_cache: Callable[[], Cache],
    texts: Sequence[Planted],
    batch: int,
) -> Recall:
    """Recall keys through empty caches.

    Args:
        model: a causal language model in evaluation mode.
        new_cache: makes an empty cache.
        texts: one a length of text.
        batch: rows side by side.
    """
    nlls, rights, gains = [], [], []
    for rows in texts:
        nll, right = _score_all(model, new_cache, rows.context, rows, batch)
        blank, _ = _score_all(model, new_cache, rows.blank, rows, batch)
        nlls.append(nll)
        rights.append(right)
        gains.append((blank - nll).mean(1))
    right = torch.cat(rights)
    gain: Difference = spread(torch.cat(gains).tolist())
    grid = [_by_depth(g, rows) for g, rows in zip(gains, texts, strict=True)]
    exact = [_by_depth(r.all(1).double(), rows) for r, rows in zip(rights, texts, strict=True)]
    return Recall(
        keys=right.shape[0],
        tokens=right.shape[1],
        nll=float(torch.cat(nlls).mean()),
        gain=gain.mean,
        gain_se=gain.se,
        correct=float(right.double().mean()),
        exact=float(right.all(1).double().mean()),
        lengths=tuple(rows.context.shape[1] for rows in texts),
        depths=texts[0].depths,
        grid=tuple(grid),
        exact_grid=tuple(exact),
    )


def _by_depth(values: Tensor, rows: Planted) -> tuple[float, ...]:
    """Means of [B] over the texts, one a depth."""
    return tuple(values.view(-1, len(rows.depths)).mean(0).tolist())


def _score_all(
    model: PreTrainedModel,
    new_cache: Callable[[], Cache],
    context: Tensor,
    rows: Planted,
    batch: int,
) -> tuple[Tensor, Tensor]:
    """`_score` of every key of `rows` after the texts `context`, on the CPU."""
    pairs = zip(context.split(batch), rows.key.split(batch), strict=True)
    parts = [_score(model, new_cache(), text, key, rows.cue) for text, key in pairs]
    nll, right = (torch.cat(p).cpu() for p in zip(*parts, strict=True))
    return nll.double(), right


@torch.inference_mode()
def _score(
    model: PreTrainedModel, cache: Cache, context: Tensor, key: Tensor, cue: int
) -> tuple[Tensor, Tensor]:
    """For the tokens after the cue, [B, K - cue]: their loss, and whether each is the likeliest."""
    model(input_ids=context, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = model(input_ids=key[:, :-1], past_key_values=cache, use_cache=True).logits
    logp = logits[:, cue - 1 :].float().log_softmax(-1)
    targets = key[:, cue:]
    return -logp.gather(-1, targets[..., None])[..., 0], logp.argmax(-1) == targets
