"""Texts with random strings planted in them: one at a time at every depth, or one at each at once.

text ... KEY ... text  beginning-of-KEY  ->  rest-of-KEY
text ... KEY1 ... KEY2 ... KEY3 ... text  beginning-of-KEY2  ->  rest-of-KEY2
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Planted:
    """Rows to be recalled; rows of a text follow each other, one a depth.

    Attributes:
        context: [B, T] int64, text with the key of the row planted in it.
        blank: [B, T] int64, the same text where other keys stand.
        key: [B, K] int64, the key that is asked for.
        cue: tokens of the key that are given.
        depths: share of the text before the key, of each row of a text.
    """

    context: Tensor
    blank: Tensor
    key: Tensor
    cue: int
    depths: tuple[float, ...]

    def to(self, device: torch.device) -> Planted:
        """The same on `device`."""
        context, blank, key = (t.to(device) for t in (self.context, self.blank, self.key))
        return Planted(context, blank, key, self.cue, self.depths)


@dataclass(frozen=True)
class Keys:
    """Where keys come from.

    Attributes:
        words: that keys are made of.
        tokenizer: turns words into tokens.
        size: tokens of a key.
        cue: tokens of it that are given before recall, below size.
        seed: of the choice.
    """

    words: Sequence[str]
    tokenizer: PreTrainedTokenizerBase
    size: int
    cue: int
    seed: int

    def draw(self, rng: random.Random) -> Tensor:
        """[size] int64 tokens of random words; every word is at least one token."""
        text = "".join(f" {rng.choice(self.words)}" for _ in range(self.size))
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids[: self.size])


def plant(texts: Tensor, depths: tuple[float, ...], keys: Keys, together: bool = False) -> Planted:
    """Plant random keys in every text.

    Args:
        texts: [n, T] int64, held-out token ids; the last tokens of a row give way to keys.
        depths: shares of the text that stand before a key, in [0, 1].
        keys: where they come from.
        together: all depths of a text hold a key at once, and each is asked for.

    Returns:
        n * len(depths) rows.
    """
    rng = random.Random(keys.seed)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for text in texts:
        mine, others = ([keys.draw(rng).to(text) for _ in depths] for _ in range(2))
        if together:
            pair = _insert(text, depths, mine), _insert(text, depths, others)
            rows += [(*pair, key) for key in mine]
            continue
        for depth, key, other in zip(depths, mine, others, strict=True):
            rows.append((_insert(text, (depth,), [key]), _insert(text, (depth,), [other]), key))
    context, blank, asked = (torch.stack(part) for part in zip(*rows, strict=True))
    return Planted(context, blank, asked, keys.cue, depths)


def _insert(text: Tensor, depths: Sequence[float], keys: Sequence[Tensor]) -> Tensor:
    """[T] with keys at shares of what is left of the text."""
    body = text[: text.shape[0] - sum(key.shape[0] for key in keys)]
    parts, start = [], 0
    for depth, key in sorted(zip(depths, keys, strict=True), key=lambda pair: pair[0]):
        stop = round(depth * body.shape[0])
        parts += [body[start:stop], key]
        start = stop
    return torch.cat([*parts, body[start:]])


def words_of(text: str, least: int = 4, most: int = 10) -> list[str]:
    """The lower-case words of `text` with `least` to `most` letters, sorted, each once."""
    return sorted(
        {w for w in text.split() if w.isalpha() and w.islower() and least <= len(w) <= most}
    )
