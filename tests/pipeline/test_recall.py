"""Planted strings come back through the cache that held them."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvsmith.pipeline.evaluation.candidate import FULL
from kvsmith.pipeline.evaluation.planted import Keys, Planted, plant, words_of
from kvsmith.pipeline.evaluation.recall import recall

Micro = Callable[..., Any]


@pytest.fixture
def model(micro_llama: Micro) -> Any:
    return micro_llama()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(2, 97, (3, 100))


class Copier:
    """Predicts what followed the latest earlier occurrence of the last three tokens."""

    def __call__(self, input_ids: Tensor, past_key_values: list[Tensor], **_: Any) -> Any:
        past_key_values.append(input_ids)
        seen = torch.cat(past_key_values, dim=1)
        logits = torch.zeros(*input_ids.shape, 97)
        first = seen.shape[1] - input_ids.shape[1]
        for row, tokens in enumerate(seen.tolist()):
            for i in range(input_ids.shape[1]):
                end = first + i + 1
                starts = [s for s in range(end - 3) if tokens[s : s + 3] == tokens[end - 3 : end]]
                if starts:
                    logits[row, i, tokens[starts[-1] + 3]] = 20
        return types.SimpleNamespace(logits=logits)


class Words:
    """A tokenizer of one token a word."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split()]}


def planted(texts: Tensor, together: bool = False) -> Planted:
    words = [f"w{i}" for i in range(2, 97)]
    keys = Keys(words, Words(), size=12, cue=4, seed=0)  # type: ignore[arg-type]
    return plant(texts, (0.0, 0.5, 1.0), keys, together)


def test_keys_are_planted_at_their_depths(ids: Tensor) -> None:
    rows = planted(ids)
    assert rows.context.shape == (9, 100) and rows.key.shape == (9, 12)
    for row, at in enumerate([0, 44, 88] * 3):
        assert rows.context[row, at : at + 12].equal(rows.key[row])
        rest = torch.cat([rows.context[row, :at], rows.context[row, at + 12 :]])
        assert rest.equal(ids[row // 3, :88])
    assert len({tuple(key.tolist()) for key in rows.key}) == 9
    assert planted(ids).key.equal(rows.key)
    assert rows.blank.shape == (9, 100) and not rows.blank[:, :12].equal(rows.context[:, :12])


def test_keys_are_planted_together(ids: Tensor) -> None:
    rows = planted(ids, together=True)
    assert rows.context.shape == rows.blank.shape == (9, 100)
    for row in range(9):
        assert rows.context[row].equal(rows.context[row // 3 * 3])
        for i, at in enumerate([0, 44, 88]):  # 64 tokens of text, 32 before the second key
            own = rows.context[row, at : at + 12]
            assert own.equal(rows.key[row // 3 * 3 + i])
            assert not own.equal(rows.blank[row, at : at + 12])
    found = recall(Copier(), list, [rows], batch=4)
    assert (found.keys, found.exact, found.lengths) == (9, 1, (100,))


def test_recall_of_a_perfect_copier_and_of_noise(model: Any, ids: Tensor) -> None:
    rows = planted(ids)
    short = planted(ids[:, :50])
    perfect = recall(Copier(), list, [short, rows], batch=4)
    assert (perfect.keys, perfect.tokens, perfect.correct, perfect.exact) == (18, 8, 1, 1)
    assert perfect.nll < 1e-5 and perfect.lengths == (50, 100)
    assert perfect.depths == (0.0, 0.5, 1.0) and perfect.exact_grid == ((1, 1, 1), (1, 1, 1))
    # Where another key is planted the copier knows nothing: log 97 nats a token.
    assert perfect.gain == pytest.approx(math.log(97), abs=0.2)
    assert sum(map(sum, perfect.grid)) / 6 == pytest.approx(perfect.gain)
    assert perfect.gain_se is not None and perfect.gain_se < 0.1
    noise = recall(model, lambda: FULL.cache(model), [rows], batch=4)
    assert noise.exact == 0 and noise.nll > 1 and abs(noise.gain) < perfect.gain / 4


def test_recall_reads_the_key_through_the_cache(ids: Tensor) -> None:
    forgetful = recall(Copier(), Forgetful, [planted(ids)], batch=4)
    assert forgetful.exact == 0


class Forgetful(list[Tensor]):
    """A cache that keeps the newest pass only."""

    def append(self, ids: Tensor) -> None:
        self[:] = [ids]


def test_words_are_plain_and_sorted() -> None:
    assert words_of("the Zebra plum, grape x1yz lemonade") == ["grape", "lemonade"]
    assert words_of("pear apple pear") == ["apple", "pear"]
