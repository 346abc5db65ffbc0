"""What every candidate reads, and what full precision says to it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvsmith.errors import explain
from kvsmith.pipeline.config import input_path
from kvsmith.pipeline.data import DataConfig, token_blocks
from kvsmith.pipeline.evaluation.candidate import FULL
from kvsmith.pipeline.evaluation.forced import reference
from kvsmith.pipeline.evaluation.greedy import generate
from kvsmith.pipeline.evaluation.options import Options, Sizes
from kvsmith.pipeline.evaluation.planted import Keys, Planted, plant, words_of
from kvsmith.pipeline.evaluation.questions import Exam, read_exam
from kvsmith.pipeline.evaluation.summaries import Task, read_task
from kvsmith.pipeline.stage import digest

# Predictions of full precision are kept up to this size, and computed for each candidate beyond.
KEEP_BYTES = 2**30


@dataclass(frozen=True)
class Material:
    """What is read by every candidate.

    Attributes:
        windows: [n, T] int64, held-out tokens.
        planted: texts with one planted string each, one entry a length.
        together: texts with a string at every depth.
        tokenizer: of the model.
        exam: questions; None where none are asked.
        task: documents to summarise; None for none.
    """

    windows: Tensor
    planted: tuple[Planted, ...]
    together: Planted
    tokenizer: PreTrainedTokenizerBase
    exam: Exam | None = None
    task: Task | None = None

    def to(self, device: torch.device) -> Material:
        """The same tokens on `device`."""
        planted = tuple(p.to(device) for p in self.planted)
        together, windows = self.together.to(device), self.windows.to(device)
        return replace(self, windows=windows, planted=planted, together=together)

    def identity(self) -> list[str]:
        """Hashes of the tokens."""
        texts = [t for p in (*self.planted, self.together) for t in (p.context, p.blank, p.key)]
        exam = () if self.exam is None else self.exam.prompts
        found = [
            hashlib.sha256(t.cpu().numpy().tobytes()).hexdigest()
            for t in (self.windows, *texts, *exam)
        ]
        texts_of: list[object] = [[] if self.exam is None else list(self.exam.answers)]
        if self.task is not None:
            prompts = [p.tolist() for p in self.task.prompts]
            texts_of += [list(self.task.references), prompts]
        return [*found, *map(digest, texts_of)]


def read_material(
    options: Options,
    data: DataConfig,
    size: Sizes,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
) -> Material:
    """Held-out windows, the same windows with strings planted in them, questions and documents.

    Args:
        options, size: what is measured.
        data: text; its held-out split is used.
        tokenizer: of the model.
        context: positions of the model.

    Raises:
        FileNotFoundError: there is no file of questions or documents.
        ValueError: the held-out text is too short, there are fewer windows than prompts or texts,
            or questions or documents do not fit the context.
    """
    o = options
    count = None if isinstance(o.windows.count, str) else o.windows.count
    windows = token_blocks(
        tokenizer, data, "heldout", count, size.length, None if count is None else o.seed
    )
    for name, value in (("greedy.prompts", o.greedy.prompts), ("recall.texts", o.recall.texts)):
        if value > len(windows):
            raise ValueError(
                explain(f"measure.{name}", "value", f"at most the {len(windows)} windows", value)
            )
    words = words_of(tokenizer.decode(windows.flatten().tolist()))
    keys = Keys(words, tokenizer, o.recall.key_tokens, o.recall.cue_tokens, o.seed)
    texts, depths = windows[: o.recall.texts], o.recall.depths
    planted = tuple(plant(texts[:, :length], depths, keys) for length in size.texts)
    together = plant(texts[:, : size.texts[-1]], depths, keys, together=True)
    exam, q = None, o.questions
    if q.path is not None:
        path = input_path(q.path)
        exam = read_exam(path, tokenizer, q.count, q.shots, q.new_tokens, context, o.seed)
    task, t = None, o.summaries
    if t.path is not None:
        path = input_path(t.path)
        task = read_task(path, tokenizer, t.count, t.shots, t.new_tokens, context, o.seed)
    return Material(windows, planted, together, tokenizer, exam, task)


@dataclass(frozen=True)
class Forced:
    """Tokens that are read through a cache and scored; see `forced`.

    Attributes:
        batches: [B, T] int64 each.
        prefill, chunk: tokens of the first and of every later pass.
    """

    batches: tuple[Tensor, ...]
    prefill: int
    chunk: int


class Control:
    """What full precision says, computed when asked for."""

    def __init__(
        self, model: PreTrainedModel, material: Material, options: Options, sizes: Sizes
    ) -> None:
        self._model, self._options = model, options
        batch, prompt = options.windows.batch, options.greedy.prompt_tokens
        self.prompts = material.windows[: options.greedy.prompts, :prompt]
        self.windows = Forced(material.windows.split(batch), sizes.prefill, options.windows.chunk)
        self._kept: dict[tuple[str, int], Tensor] = {}

    @cached_property
    def continuations(self) -> Tensor:
        """Greedy continuations of the prompts, [n, new_tokens] int64 on the CPU."""
        o = self._options
        return generate(
            self._model,
            lambda: FULL.cache(self._model),
            self.prompts,
            o.greedy.new_tokens,
            o.windows.batch,
        )

    @cached_property
    def written(self) -> Forced:
        """The prompts and their continuations, read token by token after the prompt."""
        ids = torch.cat([self.prompts, self.continuations.to(self.prompts)], dim=1)
        # The last token of the prompt predicts the first generated one.
        return Forced(ids.split(self._options.windows.batch), self.prompts.shape[1] - 1, 1)

    def logp(self, name: str, text: Forced, batch: int) -> Tensor:
        """Log-probabilities of a batch of `text`, [B, S, vocab] float32.

        Args:
            name: of the text, under which they are kept.
            text: one of this control's.
            batch: its index.
        """
        if (name, batch) in self._kept:
            return self._kept[name, batch]
        ids = text.batches[batch]
        cache = FULL.cache(self._model)
        found = reference(self._model, cache, ids, text.prefill, text.chunk)
        if found.nbytes * len(text.batches) <= KEEP_BYTES:
            self._kept[name, batch] = found
        return found
