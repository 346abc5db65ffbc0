"""Verbatim recall: a random string planted in text must be copied when its beginning returns.

    text ... KEY ... text  beginning-of-KEY  ->  rest-of-KEY

The text and the planted key are read in one forward pass. Then the beginning of the key and its
rest follow in a second one, which sees the planted key only through the cache. Scored are the
tokens of the rest: their negative log-likelihood, and whether the most likely token is the right
one. A row is exact if all of them are, which is when free-running greedy generation would copy the
whole rest.

Small models copy only in part. So every key is also scored in a text where another key stands; the
nats a token that planting the right one saves, the gain, are what the cache kept of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Planted:
    """Rows to be recalled.

    Attributes:
        context: [B, T] int64, text with the key planted in it.
        key: [B, K] int64, the key.
        cue: tokens of the key that are given.
        depths: number of depths; rows of a text follow each other, one a depth.
    """

    context: Tensor
    key: Tensor
    cue: int
    depths: int


@dataclass(frozen=True)
class Recall:
    """Figures of one candidate.

    Attributes:
        keys: planted strings.
        tokens: tokens to be copied of each.
        nll: mean negative log-likelihood of those tokens, nats.
        gain: by how much it is lower than where another key is planted, nats a token.
        gain_by_depth: the same, one number a depth.
        correct: share of tokens that are the most likely one.
        exact: share of keys with every token correct.
    """

    keys: int
    tokens: int
    nll: float
    gain: float
    gain_by_depth: tuple[float, ...]
    correct: float
    exact: float


def plant(
    texts: Tensor,
    depths: tuple[float, ...],
    words: list[str],
    tokenizer: PreTrainedTokenizerBase,
    size: int,
    cue: int,
    seed: int,
) -> Planted:
    """Plant one random key in every text at every depth.

    Args:
        texts: [n, T] int64, held-out token ids; a row's last `size` tokens give way to the key.
        depths: shares of the text that stand before the key, in [0, 1].
        words: words that keys are drawn from.
        tokenizer: turns words into tokens.
        size: tokens of a key.
        cue: tokens of the key that are given before recall, below size.
        seed: of the random words.

    Returns:
        n * len(depths) rows.
    """
    rng = random.Random(seed)
    contexts, keys = [], []
    for text in texts:
        for depth in depths:
            key = _key(words, tokenizer, size, rng).to(texts)
            at = round(depth * (text.shape[0] - size))
            contexts.append(torch.cat([text[:at], key, text[at : text.shape[0] - size]]))
            keys.append(key)
    return Planted(torch.stack(contexts), torch.stack(keys), cue, len(depths))


def recall(
    model: PreTrainedModel, new_cache: Callable[[], Cache], rows: Planted, batch: int
) -> Recall:
    """Recall the keys of `rows` through empty caches, `batch` rows at a time."""
    nll, right = _score_all(model, new_cache, rows.context, rows, batch)
    blank, _ = _score_all(model, new_cache, rows.context.roll(1, 0), rows, batch)
    gain = blank - nll
    return Recall(
        keys=right.shape[0],
        tokens=right.shape[1],
        nll=float(nll.mean()),
        gain=float(gain.mean()),
        gain_by_depth=tuple(gain.view(-1, rows.depths, gain.shape[1]).mean((0, 2)).tolist()),
        correct=float(right.double().mean()),
        exact=float(right.all(1).double().mean()),
    )


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


def words_of(text: str, least: int = 4, most: int = 10) -> list[str]:
    """The lower-case words of `text` with `least` to `most` letters, sorted, each once."""
    return sorted(
        {w for w in text.split() if w.isalpha() and w.islower() and least <= len(w) <= most}
    )


def _key(
    words: list[str], tokenizer: PreTrainedTokenizerBase, size: int, rng: random.Random
) -> Tensor:
    """`size` tokens of random words; every word is at least one token."""
    text = "".join(f" {rng.choice(words)}" for _ in range(size))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[:size])
