"""All measurements of all candidates, each against full precision; earlier results are read back.

A result is kept under the hash of everything it depends on: the cache's spec and parameters, the
model's weights, the text, the options and the versions of kvsmith, torch and transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import Cache, PreTrainedModel

import kvsmith
from kvsmith.bundle import base_model
from kvsmith.geometry import ModelGeometry
from kvsmith.hf import geometry
from kvsmith.pipeline.calibration import weights_hash
from kvsmith.pipeline.evaluation.candidate import FULL, Candidate
from kvsmith.pipeline.evaluation.fidelity import Fidelity, summarise
from kvsmith.pipeline.evaluation.footprint import Footprint, footprint
from kvsmith.pipeline.evaluation.forced import Losses, losses, own_losses, reference
from kvsmith.pipeline.evaluation.greedy import Agreement, agreement, generate
from kvsmith.pipeline.evaluation.options import Options, Sizes
from kvsmith.pipeline.evaluation.recall import Planted, Recall, recall
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.model import input_device
from kvsmith.pipeline.stage import digest, read_json, write_json
from kvsmith.sizes import cache_bytes
from kvsmith.spec import CacheSpec
from kvsmith.strict import from_dict, to_dict

# Predictions of full precision are kept up to this size, and computed for each candidate beyond.
KEEP_BYTES = 2**30
LONG = 32 * 1024
VERSION = 1  # raised when the same candidate gives other figures


@dataclass(frozen=True)
class Measurement:
    """Everything that is known of one candidate.

    Attributes:
        footprint, fidelity, agreement, recall: measured.
        long_bits: all-in bits an element at LONG tokens with dense tokens in bfloat16, computed.
    """

    footprint: Footprint
    fidelity: Fidelity
    agreement: Agreement
    recall: Recall
    long_bits: float


@dataclass(frozen=True)
class Material:
    """What is read by every candidate.

    Attributes:
        windows: [n, T] int64, held-out tokens.
        planted: texts with planted strings.
    """

    windows: Tensor
    planted: Planted

    def to(self, device: torch.device) -> Material:
        """The same tokens on `device`."""
        p = self.planted
        planted = replace(p, context=p.context.to(device), key=p.key.to(device))
        return Material(self.windows.to(device), planted)

    def identity(self) -> list[str]:
        """Hashes of the tokens."""
        tensors = (self.windows, self.planted.context, self.planted.key)
        return [hashlib.sha256(t.cpu().numpy().tobytes()).hexdigest() for t in tensors]


class Control:
    """What full precision says, computed when asked for."""

    def __init__(
        self, model: PreTrainedModel, material: Material, options: Options, sizes: Sizes
    ) -> None:
        self._model, self._options, self._sizes = model, options, sizes
        self._prompts = prompts(material, options)
        self._batches = material.windows.split(options.windows.batch)
        scored = material.windows.shape[0] * (sizes.length - sizes.prefill - 1)
        self._keep = scored * model.config.get_text_config().vocab_size * 4 <= KEEP_BYTES
        self._kept: dict[int, Tensor] = {}

    def logp(self, batch: int) -> Tensor:
        """Log-probabilities of a batch of windows, [B, S, vocab] float32."""
        if batch in self._kept:
            return self._kept[batch]
        chunk = self._options.windows.chunk
        found = reference(
            self._model, FULL.cache(self._model), self._batches[batch], self._sizes.prefill, chunk
        )
        if self._keep:
            self._kept[batch] = found
        return found

    @cached_property
    def continuations(self) -> Tensor:
        """Greedy continuations of the prompts."""
        o = self._options
        return generate(
            self._model,
            lambda: FULL.cache(self._model),
            self._prompts,
            o.greedy.new_tokens,
            o.windows.batch,
        )


def prompts(material: Material, options: Options) -> Tensor:
    """Beginnings of held-out windows, [n, T] int64."""
    return material.windows[: options.greedy.prompts, : options.greedy.prompt_tokens]


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
            with self._run.progress(len(todo) * (batches + 3), "evaluate") as progress:
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
        fidelity = self._fidelity(candidate, advance)
        text = generate(model, new_cache, prompts(self._material, o), o.greedy.new_tokens, batch)
        advance()
        copied = recall(model, new_cache, self._material.planted, batch)
        advance()
        same = agreement(self._control.continuations, text)
        return Measurement(size, fidelity, same, copied, long_bits(candidate.spec, shape))

    def _fidelity(self, candidate: Candidate, advance: Callable[[], None]) -> Fidelity:
        mine, full = [], []
        w = self._options.windows
        for i, ids in enumerate(self._material.windows.split(w.batch)):
            logp = self._control.logp(i)
            cache = candidate.cache(self._model)
            mine.append(losses(self._model, cache, ids, logp, self._sizes.prefill, w.chunk))
            full.append(own_losses(logp, ids, self._sizes.prefill))
            advance()
        return summarise(Losses.join(mine), Losses.join(full))

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
