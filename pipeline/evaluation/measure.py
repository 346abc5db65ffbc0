"""All measurements of all candidates, each against full precision; earlier results are read back.

A result is kept under the hash of everything it depends on: the cache's spec and parameters, the
model's weights, the text, the options and the versions of kvsmith, torch and transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import Cache, PreTrainedModel

import kvsmith
from kvsmith.bundle import base_model
from kvsmith.geometry import ModelGeometry
from kvsmith.hf import geometry
from kvsmith.pipeline.calibration import weights_hash
from kvsmith.pipeline.evaluation.candidate import Candidate
from kvsmith.pipeline.evaluation.drift import Drift, drift
from kvsmith.pipeline.evaluation.fidelity import Fidelity, summarise
from kvsmith.pipeline.evaluation.footprint import Footprint, footprint
from kvsmith.pipeline.evaluation.forced import Losses, losses, own_losses
from kvsmith.pipeline.evaluation.greedy import Agreement, agreement, generate
from kvsmith.pipeline.evaluation.material import Control, Forced, Material
from kvsmith.pipeline.evaluation.options import Options, Sizes
from kvsmith.pipeline.evaluation.questions import Answers, answer
from kvsmith.pipeline.evaluation.recall import Recall, recall
from kvsmith.pipeline.evaluation.summaries import Rouge, summarise_all
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.model import input_device
from kvsmith.pipeline.stage import digest, read_json, write_json
from kvsmith.sizes import cache_bytes
from kvsmith.spec import CacheSpec
from kvsmith.strict import added_later, from_dict, to_dict

LONG = 32 * 1024
PARTS = 7  # measurements beside the batches of windows
VERSION = 3  # raised when the same candidate gives other figures


@dataclass(frozen=True)
class Measurement:
    """Everything that is known of one candidate.

    Attributes:
        footprint, fidelity, agreement, drift, recall: measured.
        together: recall of several strings in one text.
        answers: of questions; None where none were asked.
        long_bits: all-in bits an element at LONG tokens with dense tokens in bfloat16, computed.
        rouge: of summaries; None where none were asked for.
    """

    footprint: Footprint
    fidelity: Fidelity
    agreement: Agreement
    drift: Drift
    recall: Recall
    together: Recall
    answers: Answers | None
    long_bits: float
    rouge: Rouge | None = added_later(None)


class Measuring:
    """The measurements of one model on one material.

    Args:
        model: in evaluation mode.
        material: tokens on the model's device.
        options, sizes: what is measured.
        store: folder of earlier results.
        run: shows progress.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        material: Material,
        options: Options,
        sizes: Sizes,
        store: Path,
        run: Run,
    ) -> None:
        self._model, self._material, self._options, self._sizes = model, material, options, sizes
        self._store, self._run = store, run
        self._control = Control(model, material, options, sizes)
        self._common = digest(
            {
                "version": VERSION,
                "model": model_identity(model),
                "device": str(input_device(model)),
                "material": material.identity(),
                "options": to_dict(options),
                "sizes": to_dict(sizes),
                "versions": versions(),
            }
        )

    def __call__(self, candidates: Iterable[Candidate]) -> list[Measurement]:
        """Measure `candidates`, full precision among them, in their order."""
        candidates = list(candidates)
        found = {c.name: self._read(c) for c in candidates}
        todo = [c for c in candidates if found[c.name] is None]
        if todo:
            batches = -(-self._material.windows.shape[0] // self._options.windows.batch)
            with self._run.progress(len(todo) * (batches + PARTS), "evaluate") as progress:
                for candidate in todo:
                    found[candidate.name] = self._measure(candidate, progress.advance)
                    write_json(self._path(candidate), found[candidate.name])
        return [m for c in candidates if (m := found[c.name]) is not None]

    def _measure(self, candidate: Candidate, advance: Callable[[], None]) -> Measurement:
        model, o = self._model, self._options
        batch = o.windows.batch

        def new_cache() -> Cache:
            return candidate.cache(model)

        shape = geometry(model.config)
        size = footprint(
            model,
            new_cache(),
            self._material.windows[:1],
            shape.elements,
            o.speed.repeats,
            o.speed.tokens,
        )
        advance()
        control, material = self._control, self._material
        fidelity = summarise(*self._losses(candidate, "windows", control.windows, advance))
        text = generate(model, new_cache, control.prompts, o.greedy.new_tokens, batch)
        advance()
        written, _ = self._losses(candidate, "written", control.written, lambda: None)
        advance()
        copied = recall(model, new_cache, material.planted, batch)
        advance()
        together = recall(model, new_cache, [material.together], batch)
        advance()
        exam = material.exam
        answers = None if exam is None else answer(model, new_cache, exam, material.tokenizer)
        advance()
        task = material.task
        rouge = None if task is None else summarise_all(model, new_cache, task, material.tokenizer)
        advance()
        return Measurement(
            footprint=size,
            fidelity=fidelity,
            agreement=agreement(control.continuations, text),
            drift=drift(written),
            recall=copied,
            together=together,
            answers=answers,
            long_bits=long_bits(candidate.spec, shape),
            rouge=rouge,
        )

    def _losses(
        self, candidate: Candidate, name: str, text: Forced, advance: Callable[[], None]
    ) -> tuple[Losses, Losses]:
        """Of the candidate and of full precision, over all batches of `text`."""
        mine, full = [], []
        for i, ids in enumerate(text.batches):
            logp = self._control.logp(name, text, i)
            cache = candidate.cache(self._model)
            mine.append(losses(self._model, cache, ids, logp, text.prefill, text.chunk))
            full.append(own_losses(logp, ids, text.prefill))
            advance()
        return Losses.join(mine), Losses.join(full)

    def _read(self, candidate: Candidate) -> Measurement | None:
        path = self._path(candidate)
        return from_dict(Measurement, read_json(path), str(path)) if path.is_file() else None

    def _path(self, candidate: Candidate) -> Path:
        key = digest({"common": self._common, "candidate": candidate.identity()})
        return self._store / f"{key[:24]}.json"


def long_bits(spec: CacheSpec | None, shape: ModelGeometry) -> float:
    """All-in bits an element of one row of LONG tokens, dense tokens in bfloat16."""
    if spec is None:
        return 16.0
    positions = int(spec.codec.key_domain == "pre")  # later keys need none
    total = cache_bytes(spec, shape, 1, LONG, torch.bfloat16, positions).total
    return 8 * total / (LONG * shape.elements)


def model_identity(model: PreTrainedModel) -> list[str]:
    """Hashes of a model's shape and weights."""
    text = model.config.get_text_config(decoder=True).to_dict()
    base = base_model(text, geometry(model.config), "model")
    return [base.config_hash, weights_hash(model)]


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    return {
        "kvsmith": kvsmith.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
