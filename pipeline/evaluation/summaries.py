"""Summaries from a local file: how many words and word pairs of the reference are said?

The file holds one JSON object a line with the texts `document` and `summary`. The first lines are
shown as examples, others are asked; the summary is generated greedily through the cache and ends at
an empty line. Figures are F1 scores of ROUGE-1, ROUGE-2 and ROUGE-L over lower-case words and
numbers, without stemming (Lin 2004, https://aclanthology.org/W04-1013).
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from kvsmith.errors import explain
from kvsmith.pipeline.evaluation.fidelity import paired, spread
from kvsmith.pipeline.evaluation.greedy import generate
from kvsmith.pipeline.evaluation.lines import read_lines

ASK, SAY, END = "Document: ", "\nSummary:", "\n\n"
WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Task:
    """Documents ready to be summarised.

    Attributes:
        prompts: [1, T] int64 tokens of each, examples included.
        references: summaries to compare with.
        new_tokens: tokens generated.
    """

    prompts: tuple[torch.Tensor, ...]
    references: tuple[str, ...]
    new_tokens: int


@dataclass(frozen=True)
class Rouge:
    """Figures of one candidate, each in [0, 1].

    Attributes:
        documents: summarised.
        rouge1, rouge2, rouge_l: mean F1 scores of words, word pairs and common subsequences.
        rouge_l_se: standard error of the last; None with one document.
        each: rouge_l of every document, for paired comparisons.
    """

    documents: int
    rouge1: float
    rouge2: float
    rouge_l: float
    rouge_l_se: float | None
    each: tuple[float, ...]


def read_task(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    shots: int,
    new_tokens: int,
    context: int,
    seed: int,
) -> Task:
    """Choose documents and write their prompts.

    Args:
        path: JSON lines.
        tokenizer: of the model.
        count: documents, at most those that fit the context.
        shots: lines shown as examples.
        new_tokens: tokens generated.
        context: positions of the model.
        seed: of the choice.

    Raises:
        FileNotFoundError, ValueError: no such file, a line that is none of a document and its
            summary, or none that fits the model's context.
    """
    lines = read_lines(path, "summaries.path", ("document", "summary"))
    examples = "".join(f"{ASK}{d}{SAY} {s}{END}" for d, s in lines[:shots])
    rest = [
        (tokens, summary)
        for document, summary in lines[shots:]
        if len(tokens := tokenizer(f"{examples}{ASK}{document}{SAY}")["input_ids"])
        <= context - new_tokens
    ]
    if not rest:
        expected = f"some that fit {context} tokens with {shots} examples and {new_tokens} new ones"
        remedy = "Lower summaries.shots or summaries.new_tokens."
        raise ValueError(explain(str(path), "documents", expected, "none", remedy))
    asked = random.Random(seed).sample(rest, min(count, len(rest)))
    prompts = tuple(torch.tensor(tokens)[None] for tokens, _ in asked)
    return Task(prompts, tuple(s for _, s in asked), new_tokens)


def summarise_all(
    model: PreTrainedModel,
    new_cache: Callable[[], Cache],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
) -> Rouge:
    """Summarise every document, each with an empty cache."""
    scores = []
    for prompt, reference in zip(task.prompts, task.references, strict=True):
        ids = generate(model, new_cache, prompt.to(model.device), task.new_tokens, 1)[0]
        said = tokenizer.decode(ids, skip_special_tokens=True).strip().split(END)[0]
        scores.append(rouge(said, reference))
    one, two, longest = zip(*scores, strict=True)
    found = spread(longest)
    means = (spread(one).mean, spread(two).mean, found.mean)
    return Rouge(len(scores), *means, found.se, longest)


def rouge(said: str, reference: str) -> tuple[float, float, float]:
    """F1 scores of ROUGE-1, ROUGE-2 and ROUGE-L."""
    mine, theirs = (WORD.findall(text.lower()) for text in (said, reference))
    scores = []
    for n in (1, 2):
        a, b = (Counter(zip(*(w[i:] for i in range(n)), strict=False)) for w in (mine, theirs))
        scores.append(_f1((a & b).total(), a.total(), b.total()))
    return scores[0], scores[1], _f1(_common(mine, theirs), len(mine), len(theirs))


def _f1(common: int, mine: int, theirs: int) -> float:
    return 2 * common / (mine + theirs) if common else 0.0


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for i, other in enumerate(b, 1):
            kept = row[i]
            row[i] = before + 1 if word == other else max(row[i], row[i - 1])
            before = kept
    return row[-1]


def compared(mine: Rouge, full: Rouge) -> str:
    """`ROUGE-1/2/L 31.0/10.2/24.1, L -0.8 +- 0.3 against full precision`, paired by document."""
    gap = paired(mine.each, full.each)
    doubt = "" if gap.se is None else f" +- {100 * gap.se:.1f}"
    values = "/".join(f"{100 * x:.1f}" for x in (mine.rouge1, mine.rouge2, mine.rouge_l))
    return f"ROUGE-1/2/L {values}, L {100 * gap.mean:+.1f}{doubt} against full precision"
