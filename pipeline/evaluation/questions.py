"""Questions with exact answers from a local file, as in GSM8K: what is left of the reasoning?

The file holds one JSON object a line with the texts `question` and `answer`; the final answer
follows "####" (GSM8K's form), or is the last number, or the whole text where there is none. The
first lines are shown as examples, others are asked; the text is generated greedily through the
cache, ends where the next question would begin, and is right if its final answer is the same.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from kvsmith.errors import explain
from kvsmith.pipeline.evaluation.fidelity import spread
from kvsmith.pipeline.evaluation.greedy import generate
from kvsmith.pipeline.evaluation.lines import read_lines

ASK, SAY = "Question: ", "\nAnswer:"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Exam:
    """Questions ready to be asked.

    Attributes:
        prompts: [1, T] int64 tokens of each, examples included.
        answers: final answers.
        new_tokens: tokens generated.
    """

    prompts: tuple[torch.Tensor, ...]
    answers: tuple[str, ...]
    new_tokens: int


@dataclass(frozen=True)
class Answers:
    """Figures of one candidate.

    Attributes:
        questions: asked.
        exact: share of right final answers.
        exact_se: its standard error; None with one question.
        right: which, for comparisons paired by question.
    """

    questions: int
    exact: float
    exact_se: float | None
    right: tuple[bool, ...]


def read_exam(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    shots: int,
    new_tokens: int,
    context: int,
    seed: int,
) -> Exam:
    """Choose questions and write their prompts.

    Args:
        path: JSON lines.
        tokenizer: of the model.
        count: questions asked, at most those that the file has beside the examples.
        shots: lines shown as examples.
        new_tokens: tokens generated.
        context: positions of the model.
        seed: of the choice.

    Raises:
        FileNotFoundError, ValueError: no such file, a line that is not a question, too few of
            them, or prompts beyond the model's context.
    """
    lines = read_lines(path, "questions.path", ("question", "answer"))
    if len(lines) <= shots:
        expected = f"more than questions.shots = {shots}"
        raise ValueError(explain(str(path), "questions", expected, len(lines)))
    examples = "".join(f"{ASK}{q}{SAY} {a}\n\n" for q, a in lines[:shots])
    rest = lines[shots:]
    asked = random.Random(seed).sample(rest, min(count, len(rest)))
    texts = [f"{examples}{ASK}{q}{SAY}" for q, _ in asked]
    prompts = tuple(torch.tensor(tokenizer(t)["input_ids"])[None] for t in texts)
    longest = max(p.shape[1] for p in prompts) + new_tokens
    if longest > context:
        expected = f"at most {context} (the model's context)"
        remedy = "Lower questions.shots or questions.new_tokens."
        got = f"{longest} with {shots} examples"
        raise ValueError(explain("questions", "tokens", expected, got, remedy))
    return Exam(prompts, tuple(final(a) for _, a in asked), new_tokens)


def final(answer: str) -> str:
    """The final answer of a text: after "####", else its last number, else all of it."""
    if "####" in answer:
        answer = answer.split("####", 1)[1].strip().split("\n")[0]
    numbers = NUMBER.findall(answer)
    text: str = numbers[-1].replace(",", "") if numbers else answer.strip().lower()
    return text.removesuffix(".0")


def answer(
    model: PreTrainedModel,
    new_cache: Callable[[], Cache],
    exam: Exam,
    tokenizer: PreTrainedTokenizerBase,
) -> Answers:
    """Ask every question, each with an empty cache."""
    right = []
    for prompt, expected in zip(exam.prompts, exam.answers, strict=True):
        ids = generate(model, new_cache, prompt.to(model.device), exam.new_tokens, 1)[0]
        said = tokenizer.decode(ids, skip_special_tokens=True).split(ASK.strip())[0]
        right.append(final(said) == expected)
    share = spread([float(r) for r in right])
    return Answers(len(right), share.mean, share.se, tuple(right))


def compared(mine: Sequence[bool], full: Sequence[bool]) -> str:
    """`+1.0 +- 0.7 points against full precision`: a difference paired by question."""
    gap = spread([float(a) - float(b) for a, b in zip(mine, full, strict=True)])
    doubt = "" if gap.se is None else f" +- {100 * gap.se:.1f}"
    return f"{100 * gap.mean:+.1f}{doubt} points against full precision"
