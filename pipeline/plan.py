"""plan.py: what fits on a device, as table, chart and JSON; the arithmetic is `kvsmith.planner`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvsmith.devices import device_by_name
from kvsmith.hf.shapes import SHAPES, model_facts, shape_config
from kvsmith.pipeline.codecs import presets
from kvsmith.pipeline.config import DebugConfig, input_path
from kvsmith.pipeline.evaluation.find import shown
from kvsmith.pipeline.log import LoggerConfig, NoLogger, Run
from kvsmith.pipeline.model import DTYPES, ModelConfig, load_config
from kvsmith.pipeline.report.capacity import plot_plan
from kvsmith.pipeline.stage import write_json
from kvsmith.planner import make_plan
from kvsmith.plans import PREFILL, RESERVE, Load, Option, Plan
from kvsmith.units import parse_count, show_bytes, show_count

COLUMNS = (
    "codec",
    "bits",
    "bytes/token",
    "cache",
    "fits",
    "longest",
    "rows",
    "read/step",
    "ms/step at least",
)


@dataclass(frozen=True)
class PlanConfig:
    """What is planned.

    Args:
        model: a shape by its name, a folder or a hub name; only its configuration is read.
        device: accelerator by name.
        devices: equal ones that layers are spread over.
        context: tokens of a row, "200k", "1M".
        batch: rows.
        codecs: names of `conf/codec`; None is all.
        factor: layers that share one owner's tokens.
        prefill: tokens of a prompt that go through the model at once.
        reserve: share of the device's memory that is left alone.
        logger: where else figures go.
        debug: has no effect: a plan takes seconds.
    """

    model: ModelConfig
    device: str = "h200"
    devices: int = 1
    context: int | str = "128k"
    batch: int = 1
    codecs: tuple[str, ...] | None = None
    factor: int = 1
    prefill: int = PREFILL
    reserve: float = RESERVE
    logger: LoggerConfig = field(default_factory=NoLogger)
    debug: DebugConfig = field(default_factory=DebugConfig)


def run(cfg: PlanConfig, folder: Path) -> Plan:
    """Plan, say it, and leave plan.json and plan.png in the run's folder.

    Args:
        cfg: what is planned.
        folder: this run's own folder.

    Raises:
        FileNotFoundError, ValueError: unknown model, device, codec or number; one line.
    """
    with Run(folder, cfg.logger, cfg) as log:
        plan = plan_of(cfg)
        for line in heading(plan):
            log.say(line)
        log.table("Caches, by bytes", COLUMNS, [cells(o) for o in by_size(plan.options)])
        for line in (*plan.notes, *verdicts(plan)):
            log.say(line)
        write_json(folder / "plan.json", plain(plan))
        plot_plan(plan, folder / "plan.png")
        log.say(f"written: {shown(folder)} (plan.json, plan.png)")
        return plan


def plan_of(cfg: PlanConfig) -> Plan:
    """The plan alone; raises as `run`."""
    device, codecs = device_by_name(cfg.device), presets(cfg.codecs)
    dtype = DTYPES.get(cfg.model.dtype, torch.bfloat16)
    context = parse_count(cfg.context, "context")
    load = Load(context, cfg.batch, dtype, cfg.prefill, cfg.reserve, cfg.devices)
    facts = model_facts(cfg.model.label, model_config(cfg.model))
    return make_plan(facts, device, load, codecs, cfg.factor)


def model_config(cfg: ModelConfig) -> Any:
    """Of a known shape, unless there is a folder of that path; else what the path holds."""
    if cfg.label in SHAPES and not input_path(cfg.path).is_dir():
        return shape_config(cfg.label)
    return load_config(cfg)


def heading(plan: Plan) -> list[str]:
    """The model, the device and where its memory goes."""
    d, m, load = plan.device, plan.model, plan.load
    rows = f"{load.batch} row{'s' * (load.batch > 1)} of {load.context:,} tokens"
    each = f", on each of {load.devices}" if load.devices > 1 else ""
    parts = (
        f"weights {show_bytes(plan.weights)}",
        f"activations {show_bytes(plan.activations)} (estimate{each})",
        f"reserve {show_bytes(plan.reserve)}{each}",
        f"left for the cache {show_bytes(plan.room)}" if plan.room > 0 else "nothing left",
    )
    return [
        f"{m.name} ({m.weights / 1e9:.3g}B parameters) on {named(plan)}: {rows}",
        f"{show_bytes(load.devices * d.memory)} at {d.bandwidth / 1e9:,.0f} GB/s: "
        f"{', '.join(parts)}",
    ]


def named(plan: Plan) -> str:
    """The device, or how many of it."""
    count = plan.load.devices
    return plan.device.name if count == 1 else f"{count} x {plan.device.name}"


def by_size(options: Sequence[Option]) -> list[Option]:
    """The smallest first; names break ties."""
    return sorted(options, key=lambda o: (o.cache, o.codec))


def cells(option: Option) -> list[str]:
    """One row under `COLUMNS`."""
    return [
        option.codec,
        f"{option.bits:.2f}",
        f"{option.bytes_per_token:,.0f}",
        show_bytes(option.cache),
        "yes" if option.fits else "no",
        show_count(option.longest),
        str(option.rows),
        show_bytes(option.read),
        f"{1e3 * option.seconds:.3g}",
    ]


def verdicts(plan: Plan) -> list[str]:
    """What the smallest cache with calibrated codebooks, and the smallest of all, say."""
    if not plan.options:
        return []
    smallest = by_size(plan.options)[0]
    ours = next((o for o in by_size(plan.options) if o.codec.startswith("nuq")), smallest)
    return [_verdict(plan, o) for o in dict.fromkeys((ours, smallest))]


def _verdict(plan: Plan, option: Option) -> str:
    load = plan.load
    rows = f"{load.batch} x " if load.batch > 1 else ""
    total, devices = option.fullest + plan.reserve, load.devices
    where = f"one {plan.device.name}" if devices == 1 else named(plan)
    of = f"{show_bytes(total)} of {show_bytes(plan.device.memory)}"
    of = of if devices == 1 else f"the fullest holds {of}"
    state = "fit" if option.fits else "do not fit"
    rate = load.batch / option.seconds
    return (
        f"{option.codec}: {rows}{load.context:,} tokens {state} {where} ({of}, longest "
        f"{show_count(option.longest)}); a step moves {show_bytes(option.read)} of cache and "
        f"{show_bytes(plan.model.read * load.dtype.itemsize)} of weights: at least "
        f"{1e3 * option.seconds:.3g} ms, at most {rate:.3g} tokens/s at peak bandwidth (computed)."
    )


def plain(plan: Plan) -> dict[str, Any]:
    """The plan as plain data."""
    skip = ("spec",)
    options = [{k: v for k, v in vars(o).items() if k not in skip} for o in by_size(plan.options)]
    return {
        "model": plan.model.name,
        "parameters": plan.model.weights,
        "positions": plan.model.positions,
        "device": vars(plan.device),
        "devices": plan.load.devices,
        "context": plan.load.context,
        "batch": plan.load.batch,
        "dtype": str(plan.load.dtype).removeprefix("torch."),
        "factor": plan.factor,
        "weights": plan.weights,
        "activations": plan.activations,
        "reserve": plan.reserve,
        "room": plan.room,
        "options": options,
        "notes": list(plan.notes),
    }
