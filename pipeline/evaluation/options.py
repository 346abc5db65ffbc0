"""What is measured, and on how much; everything here is part of a result's identity."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvsmith.errors import explain


@dataclass(frozen=True)
class WindowOptions:
    """Perplexity and divergence.

    Args:
        count: held-out windows, or "all".
        length: tokens of a window; None is the model's context, at most 4096.
        prefill: tokens read in the first forward pass; None is an eighth of the window.
        chunk: tokens decoded at once; see `forced`.
        batch: windows decoded side by side; full precision keeps batch * length * vocabulary
            floats.
    """

    count: int | str = 16
    length: int | None = None
    prefill: int | None = None
    chunk: int = 32
    batch: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.count, str) and self.count != "all":
            raise ValueError(explain("windows.count", "value", "a number or all", repr(self.count)))
        if isinstance(self.count, int):
            _positive("windows", count=self.count)
        _positive("windows", chunk=self.chunk, batch=self.batch)


@dataclass(frozen=True)
class GreedyOptions:
    """Greedy agreement; the prompts are beginnings of held-out windows.

    Args:
        prompts: continuations, at most the number of windows.
        prompt_tokens: length of a prompt.
        new_tokens: tokens generated.
    """

    prompts: int = 4
    prompt_tokens: int = 128
    new_tokens: int = 256

    def __post_init__(self) -> None:
        _positive(
            "greedy",
            prompts=self.prompts,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
        )


@dataclass(frozen=True)
class RecallOptions:
    """Verbatim recall of planted strings: alone at every depth of texts of every length, and all
    depths of the longest texts at once.

    Args:
        texts: held-out texts, at most the number of windows.
        depths: where a string stands, as shares of the text.
        lengths: tokens of a text with strings in it; None is a quarter and a half of the window.
        key_tokens: length of the string.
        cue_tokens: tokens of it that are given again.
    """

    texts: int = 4
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    lengths: tuple[int, ...] | None = None
    key_tokens: int = 24
    cue_tokens: int = 8

    def __post_init__(self) -> None:
        _positive(
            "recall", texts=self.texts, key_tokens=self.key_tokens, cue_tokens=self.cue_tokens
        )
        if not self.depths or not all(0 <= d <= 1 for d in self.depths):
            raise ValueError(
                explain("recall.depths", "value", "shares in [0, 1]", list(self.depths))
            )
        if self.texts * len(self.depths) < 2:
            raise ValueError(explain("recall", "texts times depths", "at least 2", 1))
        if self.lengths is not None and not self.lengths:
            raise ValueError(explain("recall.lengths", "value", "token counts", "none"))
        if self.cue_tokens >= self.key_tokens:
            expected = f"fewer than key_tokens = {self.key_tokens}"
            raise ValueError(explain("recall.cue_tokens", "tokens", expected, self.cue_tokens))


@dataclass(frozen=True)
class QuestionOptions:
    """Questions with exact answers; see `questions`.

    Args:
        path: JSON lines with `question` and `answer`; None asks none.
        count: questions.
        shots: first lines of the file, shown as examples.
        new_tokens: tokens generated for an answer.
    """

    path: str | None = None
    count: int = 100
    shots: int = 4
    new_tokens: int = 256

    def __post_init__(self) -> None:
        _positive("questions", count=self.count, new_tokens=self.new_tokens)
        if self.shots < 0:
            raise ValueError(explain("questions.shots", "value", "at least 0", self.shots))


@dataclass(frozen=True)
class SummaryOptions:
    """Summaries, scored by ROUGE; see `summaries`.

    Args:
        path: JSON lines with `document` and `summary`; None writes none.
        count: documents.
        shots: first lines of the file, shown as examples.
        new_tokens: tokens generated for a summary.
    """

    path: str | None = None
    count: int = 50
    shots: int = 1
    new_tokens: int = 64

    def __post_init__(self) -> None:
        _positive("summaries", count=self.count, new_tokens=self.new_tokens)
        if self.shots < 0:
            raise ValueError(explain("summaries.shots", "value", "at least 0", self.shots))


@dataclass(frozen=True)
class SpeedOptions:
    """Decoding speed of one row at the window's length.

    Args:
        repeats: timed runs; the median is reported.
        tokens: tokens of each.
    """

    repeats: int = 3
    tokens: int = 16

    def __post_init__(self) -> None:
        _positive("speed", repeats=self.repeats, tokens=self.tokens)


@dataclass(frozen=True)
class Options:
    """All measurements of one candidate.

    Args:
        windows, greedy, recall, speed, questions, summaries: see there.
        seed: chooses windows, planted strings, questions and documents.
    """

    windows: WindowOptions = field(default_factory=WindowOptions)
    greedy: GreedyOptions = field(default_factory=GreedyOptions)
    recall: RecallOptions = field(default_factory=RecallOptions)
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    questions: QuestionOptions = field(default_factory=QuestionOptions)
    summaries: SummaryOptions = field(default_factory=SummaryOptions)
    seed: int = 0


@dataclass(frozen=True)
class Sizes:
    """`Options` where the model's context is known.

    Attributes:
        length: tokens of a window.
        prefill: tokens of the first forward pass.
        texts: tokens of texts with planted strings, rising.
    """

    length: int
    prefill: int
    texts: tuple[int, ...]


def sizes(options: Options, context: int) -> Sizes:
    """Fill in what depends on the model, and check that everything fits.

    Args:
        options: what the user asked for.
        context: positions the model was trained for.

    Raises:
        ValueError: a measurement needs more tokens than the model's context or than a window holds.
    """
    w, g, r, s = options.windows, options.greedy, options.recall, options.speed
    length = w.length if w.length is not None else min(context, 4096)
    prefill = w.prefill if w.prefill is not None else length // 8
    texts = sorted(set(r.lengths if r.lengths is not None else (length // 4, length // 2)))
    _at_most("windows.length", length, context, "the model's context")
    _at_most(
        "greedy.prompt_tokens + greedy.new_tokens",
        g.prompt_tokens + g.new_tokens,
        context,
        "the model's context",
    )
    _at_most("greedy.prompt_tokens", g.prompt_tokens, length, "the window")
    _at_most("recall.lengths + recall.key_tokens", texts[-1] + r.key_tokens, length, "the window")
    _at_most("recall.key_tokens", r.key_tokens, texts[0] // 2, "half the text")
    _at_most("recall.depths * key_tokens", len(r.depths) * r.key_tokens, texts[-1], "the text")
    _at_most("speed.repeats * speed.tokens", s.repeats * s.tokens + 2, length, "the window")
    if not 1 <= prefill <= length - 2:
        raise ValueError(
            explain("windows.prefill", "tokens", f"between 1 and {length - 2}", prefill)
        )
    return Sizes(length, prefill, tuple(texts))


def _positive(where: str, **values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(explain(f"{where}.{name}", "value", "at least 1", value))


def _at_most(where: str, value: int, most: int, what: str) -> None:
    if value > most:
        raise ValueError(explain(where, "tokens", f"at most {most} ({what})", value))
