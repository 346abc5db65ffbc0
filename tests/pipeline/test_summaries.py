"""Documents from a file are summarised through the cache and scored by ROUGE."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache

from kvsmith.pipeline.evaluation import summaries
from kvsmith.pipeline.evaluation.summaries import compared, read_task, rouge, summarise_all
from tests.micro_model import write_model


@pytest.mark.parametrize(
    ("said", "reference", "want"),
    [
        ("the cat sat", "The cat, sat!", (1.0, 1.0, 1.0)),
        ("", "the cat", (0.0, 0.0, 0.0)),
        ("dog", "the cat", (0.0, 0.0, 0.0)),
        # 3 of 4 and 3 words, 1 of 3 and 2 pairs, in order "a b c" but for "x".
        ("a b x c", "a b c", (6 / 7, 2 / 5, 6 / 7)),
        # Words count as often as both have them: "a" twice, of 3 and 2; pairs once, of 2 and 1.
        ("a a a", "a a", (4 / 5, 2 / 3, 4 / 5)),
        ("c b a", "a b c", (1.0, 0.0, 1 / 3)),
    ],
)
def test_rouge_by_hand(said: str, reference: str, want: tuple[float, ...]) -> None:
    assert rouge(said, reference) == pytest.approx(want)


@pytest.fixture
def tokenizer(tmp_path: Path, micro_llama: Callable[..., Any]) -> Any:
    return AutoTokenizer.from_pretrained(write_model(tmp_path / "micro", micro_llama))


def write(path: Path, count: int = 5) -> Path:
    lines = [{"document": f"text {i} " * (i + 1), "summary": f"sum {i}"} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", "utf-8")
    return path


def test_documents_are_chosen_and_scored(
    tmp_path: Path,
    tokenizer: Any,
    micro_llama: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(tmp_path / "x.jsonl")
    task = read_task(path, tokenizer, 3, 1, 8, 512, 0)
    text = tokenizer.decode(task.prompts[0][0])
    assert text.startswith("Document: text 0") and text.endswith("Summary:")
    assert "Summary: sum 0\n\nDocument: " in text and len(task.prompts) == 3
    assert read_task(path, tokenizer, 3, 1, 8, 512, 0).references == task.references
    # Only those that fit the context are asked: prompt i has 19 + 7 (i + 1) bytes.
    short = read_task(path, tokenizer, 9, 0, 8, 45, 0)
    assert sorted(short.references) == ["sum 0", "sum 1"]
    model = micro_llama(vocab=len(tokenizer))
    found = summarise_all(model, lambda: DynamicCache(config=model.config), task, tokenizer)
    assert found.documents == 3 and found.rouge_l == 0.0  # a random model says nothing

    said = iter(task.references)

    def speak(*_: Any) -> torch.Tensor:
        return tokenizer(f" {next(said)}\n\nDocument: more", return_tensors="pt")["input_ids"]

    monkeypatch.setattr(summaries, "generate", speak)
    right = summarise_all(model, lambda: DynamicCache(config=model.config), task, tokenizer)
    assert (right.rouge1, right.rouge2, right.rouge_l) == (1.0, 1.0, 1.0)
    assert compared(right, found).endswith("L +100.0 +- 0.0 against full precision")


@pytest.mark.parametrize(
    ("content", "context", "message"),
    [
        (None, 512, r"summaries\.path: file must be of JSON lines"),
        ('{"document": "a"}', 512, "line 1: content must be an object with texts 'document' and"),
        ("[1]", 512, "line 1: content must be an object"),
        ("{", 512, "got no JSON"),
        ('{"document": "a", "summary": "b"}', 20, "documents must be some that fit 20 tokens"),
    ],
)
def test_bad_files_are_one_line(
    tmp_path: Path, tokenizer: Any, content: str | None, context: int, message: str
) -> None:
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_text(content, "utf-8")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        read_task(path, tokenizer, 4, 0, 8, context, 0)
    assert "\n" not in str(error.value)
