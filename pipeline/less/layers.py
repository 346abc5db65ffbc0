"""Training of one layer's features on its own attention.

    loss = | W (out - full) |^2 / | W (kept - full) |^2

`full` is attention over all tokens, `kept` over those that are there, `out` with the state, W the
model's output projection; at positions where something is gone. 1 is eviction alone, 0 is nothing
lost. Layers do not depend on each other. Source: LESS, arXiv:2402.09398, section 3.3. Differs:
activations stream by once; nested ranks (arXiv:2205.13147) and several budgets in one training.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvsmith.errors import explain
from kvsmith.geometry import LayerGeometry
from kvsmith.kernels.partial import Partial
from kvsmith.less.features import FeatureMap, feature_map
from kvsmith.less.spec import Exponential, less_tensors
from kvsmith.pipeline.less.options import LessTraining
from kvsmith.pipeline.less.parallel import Pick, attend_state
from kvsmith.pipeline.less.record import Layer, Replay

WARMUP = 10
BETAS = (0.9, 0.99)
# Added to the first state's logits: the one that starts best is taken.
OFFSETS = (-16.0, -12.0, -9.0, -6.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0)


class LayerTrainer:
    """Features of one layer and their optimizer.

    Args:
        cfg: how.
        layer: index, for the seed and for messages.
        shape: the layer.
        weight: [readers, hidden, H, G * Dv] output projection of each layer that reads this one.
        total: optimizer steps in all.
    """

    def __init__(
        self, cfg: LessTraining, layer: int, shape: LayerGeometry, weight: Tensor, total: int
    ) -> None:
        self.cfg, self.layer, self.shape, self.total = cfg, layer, shape, total
        self.weight = weight.detach().float()
        self.done = 0
        self.map: FeatureMap | None = None
        self.optimizer: torch.optim.Adam | None = None

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Begin with given features."""
        own = {n: t.clone().to(self.weight.device).requires_grad_() for n, t in tensors.items()}
        self.map = feature_map(self.cfg.features, own)
        self.optimizer = torch.optim.Adam(list(own.values()), lr=self.cfg.lr, betas=BETAS)

    def train(self, seen: Layer, gone: Replay, batch: int) -> float:
        """Take `cfg.steps` steps on one batch; the mean loss.

        Raises:
            ValueError: the loss is not finite.
        """
        if self.map is None:
            self.load(initial(self.cfg, self.layer, self.shape, seen, gone, self.weight))
        assert self.map is not None and self.optimizer is not None
        draw = torch.Generator().manual_seed(self.cfg.seed * 7919 + batch * 127 + self.layer)
        losses = []
        with torch.enable_grad():
            for _ in range(self.cfg.steps):
                stride = min(self.cfg.stride, gone.k.shape[2] // gone.block)
                pick = Pick(draw_one(stride, draw), stride)
                ranks = self.cfg.trained_ranks
                rank = ranks[draw_one(len(ranks), draw)]
                loss = relative_error(self.map, rank, seen, gone, self.weight, pick)
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    remedy = "Lower less.lr; the checkpoint of the last batch is kept."
                    where = f"less: layer {self.layer}"
                    what = f"loss at step {self.done + 1}"
                    raise ValueError(explain(where, what, "finite", losses[-1], remedy))
                for group in self.optimizer.param_groups:
                    group["lr"] = self.cfg.lr * schedule(self.done, self.total)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.done += 1
        return math.fsum(losses) / len(losses)

    def state(self) -> dict[str, Tensor]:
        """Everything that `restore` needs."""
        assert self.map is not None and self.optimizer is not None
        kept = {"done": torch.tensor(self.done)}
        for name, t in self.map.tensors.items():
            moments = self.optimizer.state[t]
            kept |= {f"value.{name}": t.detach()}
            kept |= {f"{m}.{name}": moments[m] for m in ("exp_avg", "exp_avg_sq")}
        return kept

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        values = {n.removeprefix("value."): t for n, t in state.items() if n.startswith("value.")}
        self.load(values)
        assert self.map is not None and self.optimizer is not None
        self.done = int(state["done"])
        for name, t in self.map.tensors.items():
            moments = {m: state[f"{m}.{name}"].to(t.device) for m in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[t] = {"step": torch.tensor(float(self.done)), **moments}

    def tensors(self) -> dict[str, Tensor]:
        """The features, float32 on the CPU."""
        assert self.map is not None
        return {n: t.detach().float().cpu().clone() for n, t in self.map.tensors.items()}


def relative_error(
    maps: FeatureMap, rank: int, seen: Layer, gone: Replay, weight: Tensor, pick: Pick
) -> Tensor:
    """The loss; arguments as in `attend_state`, `weight` as in `LayerTrainer`."""
    block, span = gone.block, slice(gone.first, gone.first + gone.k.shape[2])
    kept = Partial(pick.rows(gone.kept.out, block), pick.rows(gone.kept.lse, block))
    full = pick.rows(seen.out[:, :, span].float(), block)
    state = attend_state(maps, rank, seen.q[:, :, span], gone, pick)
    missing = projected(kept.out - full, weight)
    return projected(kept.merge(state).out - full, weight) / missing.clamp(min=1e-20)


def projected(x: Tensor, weight: Tensor) -> Tensor:
    """Mean square of [B, Hq, T, D] after the output projections of the readers."""
    readers, _, heads, _ = weight.shape
    parts = x.unflatten(1, (heads, readers, -1)).permute(2, 0, 4, 1, 3, 5).flatten(3)
    return (parts @ weight.flatten(2).transpose(1, 2)[:, None]).square().mean()


def initial(
    cfg: LessTraining, layer: int, shape: LayerGeometry, seen: Layer, gone: Replay, weight: Tensor
) -> dict[str, Tensor]:
    """First features: the paper's for its MLP; exponential ones look in random directions, with the
    bias that leaves least error.
    """
    draw = torch.Generator().manual_seed(cfg.seed * 7919 + layer)
    made = {}
    for name, (size, _) in less_tensors(cfg.features, shape, cfg.largest).items():
        bound = math.sqrt(6 / (size[-1] + size[-2]))
        made[name] = (torch.rand(size, generator=draw) * 2 - 1) * bound
        if name in ("psi.s1", "psi.s2"):
            made[name] = torch.full(size, 1e-4)
        elif name.endswith("bias"):
            made[name] = torch.zeros(size)
    if not isinstance(cfg.features, Exponential):
        return made

    blocks = gone.k.shape[2] // gone.block
    pick = Pick(0, max(1, blocks // 8))

    def error(offset: float) -> float:
        tried = {**made, "psi.bias": made["psi.bias"] + offset}
        maps = feature_map(cfg.features, {n: t.to(weight.device) for n, t in tried.items()})
        return relative_error(maps, cfg.largest, seen, gone, weight, pick).item()

    with torch.no_grad():
        best = min(OFFSETS, key=error)
    return {**made, "psi.bias": made["psi.bias"] + best}


def draw_one(count: int, draw: torch.Generator) -> int:
    """A number below `count`."""
    return int(torch.randint(0, count, (1,), generator=draw))


def schedule(step: int, total: int) -> float:
    """Warm-up, then a cosine down to a twentieth."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(step / max(total, 1), 1.0)))
    return min(1.0, (step + 1) / WARMUP) * (0.05 + 0.95 * cosine)
