"""A trained model becomes one whose layers share keys and values, and learns to live with it.

The start is computed (`convert.py`), then the model is trained towards what it was (`distill.py`).
Unfinished runs continue exactly, finished ones are skipped, as in pretraining.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from kvsmith.cla import Groups, Map
from kvsmith.errors import explain
from kvsmith.hf import geometry, share
from kvsmith.pipeline.config import config_hash
from kvsmith.pipeline.data import DataConfig, load_documents, token_blocks, token_stream
from kvsmith.pipeline.log import LoggerConfig, Run
from kvsmith.pipeline.model import ModelConfig, load_config, load_model
from kvsmith.pipeline.training.attention import register
from kvsmith.pipeline.training.convert import Start, convert
from kvsmith.pipeline.training.distill import Mix, distillation
from kvsmith.pipeline.training.division import Division
from kvsmith.pipeline.training.fits import Observed, observe
from kvsmith.pipeline.training.heldout import heldout_loss
from kvsmith.pipeline.training.loop import fit
from kvsmith.pipeline.training.lora import add_lora
from kvsmith.pipeline.training.owner_map import Measured, choose_map, measure_ties
from kvsmith.pipeline.training.plan import Optim, Phase
from kvsmith.pipeline.training.result import is_finished, write_result
from kvsmith.pipeline.training.sharding import gathered
from kvsmith.pipeline.training.unread import freeze_unread, skip_unread
from kvsmith.strict import to_dict

HELDOUT = 72  # windows


@dataclass(frozen=True)
class Uptrain:
    """How a model learns to share.

    Args:
        start: what shared keys and values start from, see `convert`.
        fit_windows: windows of training text that the start is fitted on.
        train: which weights learn; readers' key and value projections never do. `lora` leaves all
            as they are beside low-rank terms of q, k, v and o.
        rank: of those terms.
        stages: steps in which groups are tied, over the first half of training; 1 ties all at once.
        mix: the loss.
        recompute: keep less for the backward pass and compute it again.
        optim: length and speed.
        seed: of the data order.
    """

    optim: Optim
    start: Start = "joint"
    fit_windows: int = 16
    train: Literal["all", "attention", "lora"] = "all"
    rank: int = 16
    stages: int = 1
    mix: Mix = Mix()
    recompute: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("fit_windows", "stages", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(
                    explain(f"uptrain.{name}", "value", "at least 1", getattr(self, name))
                )

    def smoke(self) -> Uptrain:
        """The same path in seconds."""
        optim = replace(self.optim, tokens=1024, batch_tokens=256, phases=(Phase(1.0, 64),))
        optim = replace(optim, warmup_steps=1, checkpoint_steps=2, eval_steps=2, eval_windows=2)
        return replace(self, optim=optim, fit_windows=2)


def uptrain(
    cfg: Uptrain,
    cla: Groups | Map | Measured,
    data: DataConfig,
    model: ModelConfig,
    output: Path | None,
    work: Path,
    logger: LoggerConfig,
    overwrite: bool,
    division: Division | None = None,
) -> Path:
    """Train and write a model folder.

    Args:
        cfg: how.
        cla: which layers share.
        data: text; the train split trains, the heldout split measures.
        model: the original.
        output: folder to write; None is `model` in the run's folder.
        work: folder of unfinished runs.
        logger: where scalars go besides the run's files.
        overwrite: replace a finished model of another configuration.
        division: of the work among processes, which all call this.

    Returns:
        The folder written.

    Raises:
        ValueError: the map or the start does not fit the model, or training failed.
    """
    division = division or Division()
    if division.sharded and (cfg.stages > 1 or cfg.train == "lora"):
        expected = "1, and uptrain.train all or attention, where weights are spread (FSDP)"
        raise ValueError(explain("uptrain.stages", "value", expected, f"{cfg.stages}, {cfg.train}"))
    layers = len(geometry(load_config(model)).layers)
    owner = None if isinstance(cla, Measured) else cla.resolve(layers)
    parts = {"uptrain": cfg, "cla": cla, "data": data, "model": model}
    config = {name: to_dict(part) for name, part in parts.items()}
    identity = config_hash(config)
    folder = work / f"{model.label}-cla-{identity}"
    output = output or folder / "model"
    lead = division.workers.leads
    if is_finished(output, identity, overwrite):
        Run(None, quiet=not lead).say(f"{output} is finished (run {identity}); nothing to do")
        return output
    with division.voice(folder, logger, config) as run:
        run.say(f"run {identity}: metrics and checkpoint in {folder}")
        net, tokenizer = _load(model)
        teacher = _load(model)[0] if cfg.mix.logits or cfg.mix.hidden else None
        stream = token_stream(tokenizer, load_documents(data, "train"))
        length = max(phase.length for phase in cfg.optim.phases)
        heldout = token_blocks(tokenizer, data, "heldout", None, length)[:HELDOUT]
        windows = _fit_windows(stream, cfg.fit_windows, length)
        if owner is None:
            assert isinstance(cla, Measured)
            ties = measure_ties(net, windows, cla.reach)
            rows = [(t.reader, t.owner, f"{t.residual:.3f}", f"{t.rise:.4f}") for t in ties]
            run.table("ties", ["reader", "owner", "residual", "rise of the loss"], rows)
            owner = choose_map(ties, layers, cla.owners)
            owner = tuple(json.loads(division.workers.leaders(json.dumps(owner))))
        record: dict[str, Any] = {"original_loss": heldout_loss(net, heldout)}
        fitted = cfg.start in ("least_squares", "joint")
        seen = observe(net, windows) if fitted else None
        student = _Student(net, owner, cfg, seen)
        student.tie(cfg.stages)
        record["converted_loss"] = heldout_loss(net, heldout)
        run.say(
            f"owners {owner}: loss {record['original_loss']:.4f}, converted "
            f"{record['converted_loss']:.4f}"
        )
        student.reset()
        student.before_step(0)
        mixed = distillation(net, teacher, cfg.mix, cfg.optim.precision == "bfloat16")
        done = fit(
            cast(LlamaForCausalLM, net),
            stream,
            heldout,
            cfg.optim,
            cfg.seed,
            run,
            folder / "checkpoint.safetensors",
            identity,
            mixed,
            student.before_step,
            division,
        )
        if student.fold is not None:
            student.fold()
        net = gathered(net)
        if not lead:
            return output
        record |= {
            "identity": identity,
            **config,
            "owner": list(owner),
            "kv_bytes_per_token": 2 * geometry(net.config).elements,
            "tokens_seen": done.steps * cfg.optim.batch_tokens,
            "training_seconds": round(done.seconds),
            "training_cpu_seconds": round(done.cpu_seconds),
        }
        metrics = folder / "metrics.jsonl"
        write_result(output, net, tokenizer, heldout, "Return a", record, metrics, _card)
        run.say(f"wrote {output}")
    return output


class _Student:
    """The model as its groups are tied."""

    def __init__(
        self, net: PreTrainedModel, owner: tuple[int, ...], cfg: Uptrain, seen: Observed | None
    ) -> None:
        self._net, self._owner, self._cfg, self._seen = net, owner, cfg, seen
        self._before = {n: w.detach().clone() for n, w in net.named_parameters() if "_proj" in n}
        groups = [o for layer, o in enumerate(owner) if o != layer]
        self._groups = sorted(set(groups))
        self._tied = 0  # groups
        self.fold: Callable[[], object] | None = None  # low-rank terms into the weights

    def reset(self) -> None:
        """Back to the original, not shared; training begins, or continues, from there."""
        for name, weight in self._before.items():
            self._net.get_parameter(name).data.copy_(weight)
        share(self._net, range(len(self._owner)))
        self._tied = 0
        self._before = {}
        if self._cfg.train == "lora":
            self.fold = add_lora(self._net, self._owner, self._cfg.rank, self._cfg.seed)
        else:
            self._net.requires_grad_(self._cfg.train == "all")
            for name, weight in self._net.named_parameters():
                if any(f"self_attn.{p}_proj" in name for p in "qkvo"):
                    weight.requires_grad_(True)
            freeze_unread(self._net, self._owner)
        if self._cfg.recompute:
            self._net.activation_checkpointing_enable()
        self._net.train()

    def tie(self, stage: int, starting: bool = True) -> None:
        """Tie groups up to a stage; `starting` also sets the weights that they start from."""
        wanted = math.ceil(len(self._groups) * stage / self._cfg.stages)
        fresh = self._groups[self._tied : wanted]
        if not fresh:
            return
        if starting:
            some = [o if o in fresh else i for i, o in enumerate(self._owner)]
            convert(self._net, some, self._cfg.start, self._seen)
        tied = self._groups[:wanted]
        self._tied = wanted
        now = [o if o in tied else i for i, o in enumerate(self._owner)]
        share(self._net, now)
        if self._net.training:
            skip_unread(self._net, now)

    def before_step(self, step: int) -> None:
        """Tie what is due; a continued run's weights hold the starts of earlier steps."""
        cfg = self._cfg
        first = [cfg.optim.steps * s // (2 * cfg.stages) for s in range(cfg.stages)]
        before = sum(f < step for f in first)
        self.tie(before, starting=False)
        self.tie(sum(f <= step for f in first))


def _load(model: ModelConfig) -> tuple[PreTrainedModel, Any]:
    net, tokenizer = load_model(replace(model, dtype="float32"))
    if net.config.model_type == "llama" and net.device.type == "cpu":
        net.set_attn_implementation(register())
    return net, tokenizer


def _fit_windows(stream: Tensor, count: int, length: int) -> Tensor:
    """Evenly spread windows of the training text."""
    starts = [i * (len(stream) - length) // count for i in range(count)]
    parts = [stream[start : start + length] for start in starts]
    return stream.new_empty((count, length)).copy_(stream.new_tensor([p.tolist() for p in parts]))


def _card(name: str, record: dict[str, Any]) -> str:
    """README.md of the folder."""

    def perplexity(loss: float) -> str:
        return f"{math.exp(loss):.2f}"

    path, label = record["model"]["path"], record["model"]["name"]
    return (
        f"# {name}\n\n"
        f"{label or path}, whose layers share keys and values: layer -> owner {record['owner']}.\n"
        "kvsmith runs it (`kvsmith.hf.share(model)`); plain transformers reloads the weights and "
        "does not share.\n\n"
        "| | perplexity |\n|---|---|\n"
        f"| original | {perplexity(record['original_loss'])} |\n"
        f"| converted | {perplexity(record['converted_loss'])} |\n"
        f"| after {record['tokens_seen']:,} tokens | {perplexity(record['heldout']['loss'])} |\n"
    )
