"""What an evaluation will take, from one window that goes the whole way with every candidate.

Every part is timed on a sample and multiplied by how much more of it there is; rows side by side
count one after the other, so on a GPU this is the longest that it may take. Memory is the peak so
far, and what more rows add to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kvsmith.pipeline.calibration.predict import Prediction
from kvsmith.pipeline.evaluation.material import KEEP_BYTES
from kvsmith.pipeline.evaluation.measure import PARTS, Measurement
from kvsmith.pipeline.evaluation.options import Options, Sizes
from kvsmith.pipeline.log import peak_memory

DEPTHS = (0.2, 0.7)
NEW_TOKENS = 16


def sample(o: Options) -> Options:
    """One of everything, as long as asked for."""
    new = min(o.greedy.new_tokens, NEW_TOKENS)
    return replace(
        o,
        windows=replace(o.windows, count=1, batch=1),
        greedy=replace(o.greedy, prompts=1, new_tokens=new),
        recall=replace(o.recall, texts=1, depths=DEPTHS),
        speed=replace(o.speed, repeats=1),
        questions=replace(o.questions, path=None),
        summaries=replace(o.summaries, path=None),
    )


def predict(
    options: Options,
    size: Sizes,
    windows: int,
    found: Sequence[Measurement],
    times: Sequence[float],
    began: float,
    vocabulary: int,
    place: Path,
) -> Prediction:
    """From measurements of the `sample` to those of all.

    Args:
        options, size: of the whole evaluation.
        windows: how many it has.
        found: the sample's measurements, one a candidate.
        times: when each of their parts ended, seconds.
        began: when the first of them began.
        vocabulary: logits of a token.
        place: what the sample wrote; results do not grow with the text.

    Returns:
        Seconds of the measurements alone.
    """
    steps = [b - a for a, b in zip([began, *times], times, strict=False)]
    each = PARTS + 1  # one batch of windows
    seconds = 0.0
    for i, one in enumerate(found):
        parts = steps[i * each : (i + 1) * each]
        pairs = zip(parts, factors(options, windows), strict=True)
        seconds += sum(step * factor for step, factor in pairs)
        seconds += _tokens(options) / one.footprint.tokens_per_second
    rows, logits = min(options.windows.batch, windows), 4 * size.length * vocabulary
    more = (rows - 1) * (2 * logits + max(m.footprint.nbytes for m in found))
    kept = windows * logits if windows * logits <= KEEP_BYTES else 0
    disk = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
    return Prediction(seconds, peak_memory() + more + kept, disk, disk)


def factors(o: Options, windows: int) -> tuple[float, ...]:
    """How often each part of the sample is in the whole, in the order of `Measuring`."""
    greedy = o.greedy.prompts * o.greedy.new_tokens / min(o.greedy.new_tokens, NEW_TOKENS)
    keys = o.recall.texts * len(o.recall.depths) / len(DEPTHS)
    return (1.0, float(windows), greedy, greedy, keys, float(o.recall.texts), 1.0, 1.0)


def _tokens(o: Options) -> int:
    """Tokens decoded one at a time that the sample leaves out: timed, answers, summaries."""
    written = [q.count * q.new_tokens for q in (o.questions, o.summaries) if q.path]
    return (o.speed.repeats - 1) * o.speed.tokens + sum(written)
