"""Questions from a file are asked through the cache and compared by their final answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvsmith.pipeline.evaluation import questions
from kvsmith.pipeline.evaluation.candidate import FULL
from kvsmith.pipeline.evaluation.drift import drift
from kvsmith.pipeline.evaluation.forced import Losses
from kvsmith.pipeline.evaluation.questions import answer, compared, final, read_exam
from tests.micro_model import write_model


def write(path: Path, count: int = 6) -> Path:
    lines = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(count)]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She makes 9 * 2 = 18.\n#### 1,018\nmore 5", "1018"),
        ("so 3 apples, then 4.0", "4"),
        ("  Paris ", "paris"),
        ("it fell by -7.5 degrees", "-7.5"),
    ],
)
def test_final_answers(text: str, expected: str) -> None:
    assert final(text) == expected


def test_an_exam_is_asked_and_marked(
    tmp_path: Path, micro_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "m", micro_llama)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    exam = read_exam(write(tmp_path / "q.jsonl"), tokenizer, 100, 2, 12, 512, seed=3)
    assert len(exam.prompts) == 4 and set(exam.answers) == {"4", "6", "8", "10"}
    text = tokenizer.decode(exam.prompts[0][0])
    assert text.startswith("Question: What is 0 + 0?\nAnswer: #### 0\n\nQuestion: What is 1 + 1?")
    assert text.endswith("?\nAnswer:") and text.count("Question") == 3
    again = read_exam(tmp_path / "q.jsonl", tokenizer, 2, 2, 12, 512, seed=3)
    assert again.answers == exam.answers[:2]
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = answer(model, lambda: FULL.cache(model), exam, tokenizer)
    assert (found.questions, found.exact) == (4, 0.0)  # a random model says no numbers here

    said = iter(["4\n\nQuestion: 9", f" {exam.answers[1]}.", f"#### {exam.answers[2]} x", "no"])

    def speak(*_: Any) -> torch.Tensor:
        return torch.tensor([tokenizer(next(said))["input_ids"]])

    monkeypatch.setattr(questions, "generate", speak)
    found = answer(model, lambda: FULL.cache(model), exam, tokenizer)
    assert found.right == (exam.answers[0] == "4", True, True, False)
    assert compared((True, False), (False, False)) == "+50.0 +- 50.0 points against full precision"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "questions.path: file must be of JSON lines"),
        ("{", "line 1: content must be an object with texts 'question' and 'answer', got no JSON"),
        ('\n{"question": "a"}', "line 2: content must be"),
        ('{"question": "a", "answer": "b"}', "questions must be more than questions.shots = 1"),
        ('{"question": "a", "answer": "b"}\n' * 3, "questions: tokens must be at most 30"),
    ],
)
def test_mistakes_are_said(
    content: str | None, message: str, tmp_path: Path, micro_llama: Callable[..., Any]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_model(tmp_path / "m", micro_llama))
    if content is not None:
        (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        read_exam(tmp_path / "q.jsonl", tokenizer, 5, 1, 10, 30, seed=0)


def test_drift_is_cut_into_slices() -> None:
    kld = torch.arange(40.0).repeat(2, 1) + torch.tensor([[0.0], [2.0]])
    found = drift(Losses(torch.zeros(2), kld, torch.tensor([0.5, 1.0], dtype=torch.float64)))
    assert (found.prompts, found.tokens, found.same) == (2, 40, 0.75)
    assert found.kld == pytest.approx(20.5) and found.kld_se == pytest.approx(1.0)
    assert len(found.curve) == 16 and found.upto[-1] == 40
    assert found.curve[0] == pytest.approx(2.0)  # the first three tokens, 0 to 2, and one more
