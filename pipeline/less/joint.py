"""All layers at once: features go on to learn from the model's predictions.

    loss = KL(full model || model with every state), mean over positions where something is gone

Layer by layer, each sees the inputs of the full model; in use those below are compressed too. Here
they are: a layer evicts by what reaches it, as in decoding. The gradient goes through the residual
stream, the MLPs and the features; queries, and attention over tokens that are there, are taken as
given. The processes divide the parts of each batch, and find what one process finds.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from kvsmith.errors import explain
from kvsmith.eviction.policy import Policy
from kvsmith.less.features import FeatureMap, feature_map
from kvsmith.pipeline.less.layers import BETAS, draw_one, schedule
from kvsmith.pipeline.less.parallel import attend_state
from kvsmith.pipeline.less.record import Layer, forward
from kvsmith.pipeline.less.training import Training
from kvsmith.pipeline.stage import read_safetensors, write_safetensors

PART = 4  # sequences whose gradient is taken at once


class Joint:
    """Further steps of all features of a training.

    Args:
        training: all layers trained.
    """

    def __init__(self, training: Training) -> None:
        self.training, self.cfg, self.workers = training, training.cfg, training.workers
        self.maps: dict[int, FeatureMap] = {}
        self.values: dict[str, Tensor] = {}
        self.optimizer: torch.optim.Adam | None = None

    def run(self) -> None:
        """Take `cfg.joint_steps` steps and give the features back to the training.

        Raises:
            ValueError: a loss is not finite.
            SystemExit: 143 after SIGTERM, with the checkpoint written.
        """
        done, log = self._start(), self.training.log
        batches = self.training.tokens.split(self.cfg.batch_size)
        with log.progress(self.cfg.joint_steps, "steps", done) as bar:
            for step in range(done, self.cfg.joint_steps):
                loss = self._step(step, batches[step % len(batches)])
                log.scalars(len(batches) + step + 1, {"loss/joint": loss})
                self._save(step + 1)
                bar.advance(1, loss=loss)
                self.training.stop.leave_if_asked()
        for i, trainer in self.training.trainers.items():
            trainer.load({n: t.detach() for n, t in self.maps[i].tensors.items()})

    def _step(self, step: int, ids: Tensor) -> float:
        assert self.optimizer is not None
        draw = torch.Generator().manual_seed(self.cfg.seed * 7919 + step)
        rank = self.cfg.trained_ranks[draw_one(len(self.cfg.trained_ranks), draw)]
        policy = self.training.policy(self.cfg.budgets[step % len(self.cfg.budgets)])
        loss, gradients = self._gradients(ids, rank, policy)
        if not math.isfinite(loss):
            remedy = "Lower less.joint_lr; the checkpoint of the last step is kept."
            what = f"loss at step {step + 1}"
            raise ValueError(explain("less: all layers", what, "finite", loss, remedy))
        for name, t in self.values.items():
            t.grad = gradients[name].to(t.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.cfg.joint_lr * schedule(step, self.cfg.joint_steps)
        self.optimizer.step()
        return loss

    def _gradients(self, ids: Tensor, rank: int, policy: Policy) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of a batch: sums over its parts in their order, whoever takes them."""
        parts = ids.split(PART)
        own: dict[str, Tensor] = {}
        for number in self.workers.share(range(len(parts))):
            with torch.enable_grad():
                loss = self._loss(parts[number].to(self.workers.device), rank, policy)
                loss = loss * (len(parts[number]) / len(ids))
                found = torch.autograd.grad(
                    loss, list(self.values.values()), materialize_grads=True
                )
            own[f"{number} loss"] = loss.detach()
            own |= {f"{number} {n}": g for n, g in zip(self.values, found, strict=True)}
        shapes = {"loss": (), **{n: tuple(t.shape) for n, t in self.values.items()}}
        every = {f"{p} {n}": shape for p in range(len(parts)) for n, shape in shapes.items()}
        owner = {name: int(name.split()[0]) % self.workers.count for name in every}
        all_parts = self.workers.gather(own, every, owner, self.training.stop)
        sums = {n: sum(all_parts[f"{p} {n}"] for p in range(len(parts))) for n in shapes}
        return float(sums.pop("loss")), sums  # type: ignore[return-value]

    def _loss(self, ids: Tensor, rank: int, policy: Policy) -> Tensor:
        """Divergence from the full model, nats a token."""
        model, first = self.training.model, 0

        def visit(seen: Layer) -> Tensor | None:
            nonlocal first
            if seen.index not in self.maps:
                return None
            gone = self.training.replay(seen, policy)
            first, last = gone.first, gone.first + gone.k.shape[2]
            state = attend_state(self.maps[seen.index], rank, seen.q[:, :, first:last], gone)
            mixed = gone.kept.merge(state).out.to(seen.out.dtype)
            return torch.cat([seen.out[:, :, :first], mixed, seen.out[:, :, last:]], 2)

        with torch.no_grad():
            full = model(input_ids=ids, use_cache=False).logits
        logp = forward(model, ids, visit)[:, first:].float().log_softmax(-1)
        wanted = full[:, first:].float().log_softmax(-1)
        return (wanted.exp() * (wanted - logp)).sum(-1).mean()

    # -- checkpoints ------------------------------------------------------------------------------

    @property
    def _checkpoint(self) -> Path:
        return self.training.folder / "joint.safetensors"

    def _start(self) -> int:
        """Features and optimizer as training left them, or those of the checkpoint; steps done."""
        whole = self.training.tensors()
        state = read_safetensors(self._checkpoint) if self._checkpoint.is_file() else {}
        self.workers.wait(self.training.stop)  # all have read it before the first one writes
        done = int(state.get("done", torch.tensor(0)))
        for name, tensor in whole.items():
            value = state.get(f"value.{name}", tensor).clone().to(self.workers.device)
            self.values[name] = value.requires_grad_()
        self.optimizer = torch.optim.Adam(
            list(self.values.values()), lr=self.cfg.joint_lr, betas=BETAS
        )
        if done:
            for name, t in self.values.items():
                moments = {m: state[f"{m}.{name}"].to(t.device) for m in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[t] = {"step": torch.tensor(float(done)), **moments}
            self.training.log.say(f"continuing all layers at step {done} of {self.cfg.joint_steps}")
        for i in self.training.layers:
            prefix = f"layers.{i}.less."
            own = {
                n.removeprefix(prefix): t for n, t in self.values.items() if n.startswith(prefix)
            }
            self.maps[i] = feature_map(self.cfg.features, own)
        return done

    def _save(self, done: int) -> None:
        assert self.optimizer is not None
        if not self.workers.leads:
            return
        state = {"done": torch.tensor(done)}
        for name, t in self.values.items():
            moments = self.optimizer.state[t]
            state[f"value.{name}"] = t.detach()
            state |= {f"{m}.{name}": moments[m] for m in ("exp_avg", "exp_avg_sq")}
        write_safetensors(self._checkpoint, state)
