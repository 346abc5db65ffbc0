"""train.py less=... dry_run=true: what a training will take, by arithmetic from the configuration.

Nothing is loaded and nothing was measured: the two speeds below are assumptions, said in the text.
"""

from __future__ import annotations

from math import prod

from kvsmith.eviction.policy import KeepAll
from kvsmith.geometry import LayerGeometry
from kvsmith.layout import evicting_layers
from kvsmith.less.spec import less_tensors
from kvsmith.pipeline.less.joint import PART
from kvsmith.pipeline.less.options import LessTraining
from kvsmith.plans import ModelFacts
from kvsmith.spec import CacheSpec

FLOPS = 2e14  # of a GPU with 16-bit weights, a fifth to a half of its peak
LAUNCHES = 1e-3  # seconds of one eviction step of one layer, which waits on launches
JOINT_PASSES = 4  # full, compressed, and two backwards, in forward passes
STEP_ROWS = 6  # multiply-adds forward and backward of a product, times 2


def estimate(facts: ModelFacts, spec: CacheSpec, cfg: LessTraining, length: int) -> list[str]:
    """Sentences with time and memory.

    Args:
        facts: the model's sizes.
        spec: the cache that is trained for.
        cfg: options.
        length: tokens of a sequence.
    """
    assert not isinstance(spec.eviction, KeepAll)
    layers = [facts.geometry.joined(i) for i in evicting_layers(spec, facts.geometry)]
    tokens, batches = cfg.samples * length, -(-cfg.samples // cfg.batch_size)
    forward = 2.0 * facts.weights * tokens
    forward += sum(2.0 * g.query_heads * g.k_dim * length * tokens for g in facts.geometry.layers)
    events = max(length - spec.eviction.budget, 0) // spec.codec.block_size
    replay = batches * events * len(layers) * LAUNCHES
    rows = cfg.batch_size * events * spec.codec.block_size
    fit = batches * cfg.steps * sum(_step(g, cfg, rows, facts.hidden) for g in layers)
    numbers = sum(_numbers(g, cfg) for g in layers)
    owners = [facts.geometry.joined(i) for i in facts.geometry.owners]
    seen = max(_activations(g, cfg.batch_size * length) for g in owners)
    joint = cfg.joint_steps * JOINT_PASSES * forward / batches
    again = cfg.joint_steps * -(-cfg.batch_size // PART) * events * len(layers) * LAUNCHES
    seconds = forward / FLOPS + replay + fit / FLOPS + joint / FLOPS + again
    return [
        f"{facts.name}: {tokens:,} tokens once ({cfg.samples} sequences of {length}), "
        f"{len(layers)} layers at once.",
        f"reading: 2 x {facts.weights / 1e9:.2f}e9 weights x tokens, and attention, "
        f"{forward:.1e} operations: {forward / FLOPS:.0f} s at {FLOPS:.0e} a second (assumed).",
        f"eviction: {events} steps x {batches} batches x {len(layers)} layers: {replay:.0f} s at "
        f"{1e3 * LAUNCHES:.0f} ms each (assumed).",
        f"training: {batches * cfg.steps} steps a layer, {fit:.1e} operations: "
        f"{fit / FLOPS:.0f} s.",
        f"all layers at once: {cfg.joint_steps} steps, {joint:.1e} operations: "
        f"{joint / FLOPS + again:.0f} s with their eviction.",
        f"in all about {seconds / 60:.0f} minutes on one GPU; processes share all but the reading.",
        f"features: {numbers:,} numbers, {100 * numbers / facts.weights:.3f} % of the weights; "
        f"{12 * numbers / 2**20:.0f} MiB with Adam's moments.",
        f"memory: {2 * facts.weights / 2**30:.1f} GiB of 16-bit weights, read into host memory "
        f"once; {seen / 2**30:.2f} GiB for activations of one layer; nothing is recorded.",
    ]


def _step(g: LayerGeometry, cfg: LessTraining, rows: int, hidden: int) -> float:
    """Operations of one optimizer step: the projection of sampled rows, features of all keys."""
    ends = STEP_ROWS * rows / cfg.stride * g.query_heads * g.v_dim * hidden
    return ends + STEP_ROWS * rows * g.kv_heads * cfg.largest * (g.k_dim + g.v_dim)


def _numbers(g: LayerGeometry, cfg: LessTraining) -> int:
    shapes = less_tensors(cfg.features, g, cfg.largest).values()
    return sum(prod(shape) for shape, _ in shapes)


def _activations(g: LayerGeometry, tokens: int) -> float:
    """Bytes of queries and outputs (16 and 32 bits) and of keys and values, twice."""
    return tokens * (g.query_heads * g.k_dim * 10 + g.elements * 8)
