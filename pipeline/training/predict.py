"""What a training will take, from a few steps of each sequence length that go the whole way.

The steps are real ones, of whole batches, so memory is that of the training. Their first of each
length is left out: it also pays for what is set up once. A checkpoint and a running measure are
timed together and counted for each of either, so the time is rather too long than too short.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvsmith.pipeline.calibration.predict import Prediction, Quiet
from kvsmith.pipeline.log import LoggerConfig, Run, peak_memory
from kvsmith.pipeline.training.division import Division
from kvsmith.pipeline.training.plan import Optim, Phase

STEPS = 3  # of each sequence length


@dataclass(frozen=True)
class Rehearsal(Division):
    """One process that says nothing and notes when each step was done."""

    times: list[float] = field(default_factory=list)

    def voice(self, folder: Path, _logger: LoggerConfig, _config: object) -> Run:
        return Quiet("tokens", folder, self.times)


def shortened(optim: Optim) -> Optim:
    """A few steps of each sequence length, and at their end a checkpoint and a measure."""
    count = len(optim.phases)
    phases = tuple(Phase(1 / count, phase.length) for phase in optim.phases)
    steps = STEPS * count
    tokens = steps * optim.batch_tokens
    return replace(
        optim, tokens=tokens, phases=phases, checkpoint_steps=steps + 1, eval_steps=steps + 1
    )


def predict(
    optim: Optim, pieces: int, train: Callable[[Optim, Path, Division], Path]
) -> Prediction:
    """Predict a training.

    Args:
        optim: of the whole training.
        pieces: see `Division`.
        train: trains below a folder as the whole training would; gives the result's folder.

    Returns:
        The prediction; nothing is left on disk.
    """
    rehearsal, began = Rehearsal(pieces=pieces), time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        result = train(shortened(optim), Path(place), rehearsal)
        whole = time.monotonic() - began
        kept, peak = (_size(path) for path in (result, Path(place)))
    return Prediction(_seconds(optim, whole, rehearsal.times), peak_memory(), kept, peak)


def _seconds(optim: Optim, whole: float, times: Sequence[float]) -> float:
    """Of a training, by the time of the short one and of the ends of its steps."""
    each = [times[STEPS * i + 1] - times[STEPS * i] for i in range(len(optim.phases))]
    ending = max(times[-1] - times[-2] - each[-1], 0.0)
    fixed = whole - STEPS * sum(each) - ending
    steps = sum(s * optim.steps * p.share for s, p in zip(each, optim.phases, strict=True))
    endings = optim.steps // optim.checkpoint_steps + optim.steps // optim.eval_steps + 1
    return max(fixed, 0.0) + steps + endings * ending


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
