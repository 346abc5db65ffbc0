"""One sweep over the text trains the states of all layers.

Each batch of sequences goes through the model once; at every layer the eviction is replayed and its
features take their steps before the next layer's activations come, so nothing is recorded. Layers
are spread over processes; each sees the same sequences, so their number does not change a layer's
result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvsmith.errors import explain
from kvsmith.eviction.policy import KeepAll, Policy
from kvsmith.hf.geometry import geometry
from kvsmith.hf.seam import attention_modules
from kvsmith.layout import evicting_layers
from kvsmith.less.spec import less_tensors
from kvsmith.pipeline.less.allot import allot_ranks
from kvsmith.pipeline.less.layers import LayerTrainer, projected, relative_error
from kvsmith.pipeline.less.options import LessTraining, scaled
from kvsmith.pipeline.less.parallel import Pick
from kvsmith.pipeline.less.record import Layer, Replay, replay, sweep
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.stage import Stop, read_safetensors, write_safetensors
from kvsmith.pipeline.workers import Workers
from kvsmith.sizes import STATE_BYTES
from kvsmith.spec import CacheSpec
from kvsmith.stores import make_store

WORSE = 1.5  # times the error of eviction alone: training has diverged
PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj")


@dataclass
class Training:
    """One training of all layers, each for itself; `joint.py` goes on with all at once.

    Args:
        model: in evaluation mode, on the workers' device.
        spec: the cache that is trained for, without a state.
        parameters: of its codec.
        cfg: options.
        tokens: [samples, length] int64 sequences that train.
        held: [held, length] sequences that measure.
        folder: of the unfinished run.
        workers: the processes.
        log: shows progress.
        stop: asks to leave.
    """

    model: PreTrainedModel
    spec: CacheSpec
    parameters: dict[str, Tensor]
    cfg: LessTraining
    tokens: Tensor
    held: Tensor
    folder: Path
    workers: Workers
    log: Run
    stop: Stop

    def __post_init__(self) -> None:
        self.geometry = geometry(self.model.config)
        self.layers = evicting_layers(self.spec, self.geometry)
        self.own = self.workers.share(self.layers)
        batches = -(-len(self.tokens) // self.cfg.batch_size)
        weights = projections(self.model)
        self.trainers = {
            i: LayerTrainer(
                self.cfg, i, self.geometry.joined(i), weights[i], batches * self.cfg.steps
            )
            for i in self.own
        }
        self.done = dict.fromkeys(self.own, 0)

    # -- training ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Train every layer; goes on from the last checkpoints, layers from theirs.

        Raises:
            ValueError: a loss is not finite.
            SystemExit: 143 after SIGTERM, with the checkpoint written.
        """
        batches = self.tokens.split(self.cfg.batch_size)
        first = self._restore()
        if first == len(batches):
            return
        if first:
            self.log.say(f"continuing at batch {first} of {len(batches)} from {self.folder}")
            self.log.rewind(first)
        with self.log.progress(self.tokens.numel(), "tokens", self._tokens_before(first)) as bar:
            for number in range(first, len(batches)):
                losses = self._batch(number, batches[number])
                mean = sum(losses.values()) / max(len(losses), 1)
                self.log.scalars(number + 1, {f"loss/{i}": x for i, x in losses.items()})
                self._save()
                bar.advance(batches[number].numel(), loss=mean)
                self.stop.leave_if_asked()

    def _tokens_before(self, batch: int) -> int:
        return min(batch * self.cfg.batch_size, len(self.tokens)) * self.tokens.shape[1]

    def _batch(self, number: int, ids: Tensor) -> dict[int, float]:
        policy = self.policy(self.cfg.budgets[number % len(self.cfg.budgets)])
        losses: dict[int, float] = {}

        def visit(seen: Layer) -> None:
            if seen.index in self.own and self.done[seen.index] <= number:
                gone = self.replay(seen, policy)
                losses[seen.index] = self.trainers[seen.index].train(seen, gone, number)

        sweep(self.model, ids.to(self.workers.device), visit)
        self.done = {i: max(done, number + 1) for i, done in self.done.items()}
        return losses

    def policy(self, factor: float) -> Policy:
        """The eviction with its budget times a factor."""
        assert not isinstance(self.spec.eviction, KeepAll)
        codec = self.spec.codec
        least = codec.sinks + codec.most_recent + 2 * codec.block_size
        return scaled(self.spec.eviction, factor, least)

    def replay(self, seen: Layer, policy: Policy) -> Replay:
        """What a policy does to a layer's attention.

        Raises:
            ValueError: the sequences are too short for it to evict.
        """
        own = CacheSpec(self.spec.codec, policy, self.spec.page_size)
        store = make_store(own, self.geometry, seen.index, self.parameters)
        gone = replay(seen, store)  # type: ignore[arg-type]
        if gone is None:
            expected = f"more than the budget of {policy.budget} and a block"
            raise ValueError(
                explain("less.length", "tokens of a sequence", expected, seen.q.shape[2])
            )
        return gone

    # -- measuring --------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self) -> tuple[dict[int, dict[int, float]], dict[int, float]]:
        """layer -> rank -> share of the error left, and layer -> error, on held sequences."""
        left: dict[int, dict[int, list[float]]] = {
            i: {r: [] for r in sorted(self.cfg.trained_ranks)} for i in self.own
        }
        error: dict[int, list[float]] = {i: [] for i in self.own}

        def visit(seen: Layer) -> None:
            if seen.index not in self.own:
                return
            trainer, gone = self.trainers[seen.index], self.replay(seen, self.policy(1.0))
            error[seen.index].append(attention_error(seen, gone, trainer.weight))
            for rank, shares in left[seen.index].items():
                assert trainer.map is not None
                found = relative_error(trainer.map, rank, seen, gone, trainer.weight, Pick())
                shares.append(found.item())

        for ids in self.held.split(self.cfg.batch_size):
            sweep(self.model, ids.to(self.workers.device), visit)
            self.stop.leave_if_asked()
        mean = {i: {r: sum(x) / len(x) for r, x in by.items()} for i, by in left.items()}
        _check_gain(mean)
        return self._everyones(mean, {i: sum(x) / len(x) for i, x in error.items()})

    def _everyones(
        self, left: dict[int, dict[int, float]], error: dict[int, float]
    ) -> tuple[dict[int, dict[int, float]], dict[int, float]]:
        ranks = sorted(self.cfg.trained_ranks)
        own = {
            f"layer.{i}": torch.tensor([error[i], *(left[i][r] for r in ranks)]) for i in self.own
        }
        shapes = {f"layer.{i}": (1 + len(ranks),) for i in self.layers}
        found = self.workers.gather(own, shapes, self._owner(shapes), self.stop)
        rows = {i: found[f"layer.{i}"].tolist() for i in self.layers}
        return (
            {i: dict(zip(ranks, row[1:], strict=True)) for i, row in rows.items()},
            {i: row[0] for i, row in rows.items()},
        )

    # -- results ----------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Features of every layer, from all processes."""
        own = {
            f"layers.{i}.less.{n}": t
            for i in self.own
            for n, t in self.trainers[i].tensors().items()
        }
        shapes = {
            f"layers.{i}.less.{n}": size
            for i in self.layers
            for n, (size, _) in less_tensors(
                self.cfg.features, self.geometry.joined(i), self.cfg.largest
            ).items()
        }
        return self.workers.gather(own, shapes, self._owner(shapes), self.stop)

    def ranks(self, left: dict[int, dict[int, float]], error: dict[int, float]) -> tuple[int, ...]:
        """Ranks as allotted for the bytes of `cfg.rank` everywhere."""
        value, scale = STATE_BYTES[self.cfg.store_dtype]
        shapes = {i: self.geometry.layers[i] for i in self.layers}
        cost = {i: g.kv_heads * (4.0 + value * g.v_dim + scale) for i, g in shapes.items()}
        return allot_ranks(left, error, cost, self.cfg.rank)

    def _owner(self, names: Iterable[str]) -> dict[str, int]:
        """The process of each name, which has its layer as second part."""
        process = {i: place % self.workers.count for place, i in enumerate(self.layers)}
        return {name: process[int(name.split(".")[1])] for name in names}

    # -- checkpoints ------------------------------------------------------------------------------

    @property
    def _checkpoint(self) -> Path:
        return self.folder / f"checkpoint-{self.workers.rank}-of-{self.workers.count}.safetensors"

    def _save(self) -> None:
        state: dict[str, Tensor] = {}
        for i, trainer in self.trainers.items():
            state |= {f"{i}.{name}": t for name, t in trainer.state().items()}
            state[f"{i}.batches"] = torch.tensor(self.done[i])
        write_safetensors(self._checkpoint, state)

    def _restore(self) -> int:
        """Batches that all layers of this process have finished.

        A layer's state is the same whoever trained it, so the checkpoints of any number of
        processes will do.
        """
        for path in sorted(self.folder.glob("checkpoint-*-of-*.safetensors")):
            found: dict[str, dict[str, Tensor]] = {str(i): {} for i in self.own}
            for name, t in read_safetensors(path).items():
                layer, _, part = name.partition(".")
                found.get(layer, {})[part] = t
            for i in self.own:
                state = found[str(i)]
                batches = int(state.pop("batches", torch.tensor(0)))
                if batches > self.done[i]:
                    self.trainers[i].restore(state)
                    self.done[i] = batches
        return min(self.done.values(), default=0)


def _check_gain(left: dict[int, dict[int, float]]) -> None:
    """Refuse features that are worse than none."""
    for layer, by in left.items():
        if not min(by.values()) < WORSE:
            what = "error left beside eviction alone"
            remedy = "Lower less.lr, or train on more sequences."
            got = min(by.values())
            raise ValueError(explain(f"less: layer {layer}", what, f"below {WORSE}", got, remedy))


@torch.no_grad()
def attention_error(seen: Layer, gone: Replay, weight: Tensor) -> float:
    """Mean square of what eviction alone loses, after the output projection."""
    span = slice(gone.first, gone.first + gone.k.shape[2])
    missing = gone.kept.out - seen.out[:, :, span].float()
    return float(projected(missing, weight))


def projections(model: PreTrainedModel) -> dict[int, Tensor]:
    """owning layer -> [readers, hidden, H, G * Dv] output projections of attention.

    Raises:
        ValueError: an attention module has no projection by a known name.
    """
    found = {}
    for module in attention_modules(model):
        part = next((getattr(module, n) for n in PROJECTIONS if hasattr(module, n)), None)
        if part is None:
            where = f"model ({model.config.model_type})"
            expected = f"named {', '.join(PROJECTIONS)}"
            raise ValueError(explain(where, "output projection", expected, "none of them"))
        # transformers' Conv1D (GPT-2) keeps its weight the other way round.
        weight = part.weight if isinstance(part, nn.Linear) else part.weight.T
        found[int(module.layer_idx)] = weight  # type: ignore[arg-type]
    shape = geometry(model.config)
    return {
        i: torch.stack(
            [found[r].unflatten(1, (shape.layers[i].kv_heads, -1)) for r in shape.readers(i)]
        )
        for i in shape.owners
    }
