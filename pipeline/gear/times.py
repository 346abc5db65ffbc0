"""CPU time of encoding a block and of attending to a long layer, with the parts off and on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from kvsmith.attention import Scores, attend_store
from kvsmith.codec import Codec
from kvsmith.fused import UNLIMITED
from kvsmith.geometry import LayerGeometry
from kvsmith.key_rotation import KeyRotation
from kvsmith.pipeline.codecs import load_codec
from kvsmith.pipeline.gear.error import ways
from kvsmith.pipeline.log import Run
from kvsmith.rope import Positions
from kvsmith.spec import CodecSpec
from kvsmith.store import LayerStore

HEADS, DIM, BLOCK = 8, 128, 64
SHAPE = LayerGeometry(HEADS, 32, DIM, DIM)
COLUMNS = ("codec", "parts", "CPU ms", "least", "most", "over Q", "over it without L")


class Open:
    """A mask that hides nothing."""

    padding = None
    is_causal = True
    reach = UNLIMITED

    def window(self, rows: slice, columns: slice) -> Tensor | None:
        """Every query sees every column."""
        return None


def turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """CPU milliseconds of calls that take turns, after two that warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(repeats + 2):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            if i > 1:
                times[name].append(1e3 * (time.process_time() - begin))
    return times


def _rows(codec: str, found: Mapping[str, list[float]]) -> list[list[str]]:
    """Medians and ranges; ratios are medians of those within a turn."""

    def ratio(name: str, base: str) -> str:
        pairs = zip(found[name], found[base], strict=True)
        return f"{statistics.median(a / b for a, b in pairs):.2f}"

    rows = []
    for name, t in found.items():
        spread = [f"{x:.2f}" for x in (statistics.median(t), min(t), max(t))]
        rows.append(
            [codec, name, *spread, ratio(name, "Q"), ratio(name, name.removesuffix(" + L"))]
        )
    return rows


def _codecs(spec: CodecSpec) -> tuple[Codec, Codec]:
    k, v = (Codec(c, HEADS, DIM, torch.float16, {}, "x", BLOCK) for c in (spec.k, spec.v))
    return k, v


def encode(log: Run, repeats: int = 60) -> None:
    """A block of 64 tokens, 8 heads of 128, keys and values."""
    pair = torch.randn(2, 1, HEADS, BLOCK, DIM).unbind(0)
    rows = []
    for name in ("gear4", "gear2", "gear_q4", "gear_q2"):
        calls = {}
        for way, spec in ways(load_codec(name)).items():
            codecs = _codecs(spec)
            calls[way] = lambda codecs=codecs: [
                c.encode(x) for c, x in zip(codecs, pair, strict=True)
            ]
        rows += _rows(name, turns(calls, repeats))
    log.table(f"encoding {BLOCK} tokens x {HEADS} heads x {DIM}, n = {repeats}", COLUMNS, rows)


def decode(log: Run, tokens: int = 32768, repeats: int = 21) -> None:
    """One token attends to a layer: a prompt of 32,768, a block that was generated, and itself.

    32 query and 8 KV heads of 128; keys are stored after RoPE, as GEAR's presets have them.
    """
    k, v = torch.randn(2, 1, HEADS, tokens, DIM).unbind(0)
    q, scores = torch.randn(1, 32, 1, DIM), Scores(DIM**-0.5)
    still = KeyRotation(Positions(128), None, torch.float32, None, None)
    rows = []
    for name in ("gear4", "gear2", "gear_q4", "gear_q2"):
        calls = {}
        for way, spec in ways(load_codec(name)).items():
            store = LayerStore(spec, SHAPE, 128, *_codecs(spec))
            for count in (tokens, BLOCK, 1):
                store.append(k[:, :, :count], v[:, :, :count])
            calls[way] = partial(
                attend_store,
                q,
                k[:, :, :1],
                v[:, :, :1],
                store,
                store.length - 1,
                Open(),
                still,
                scores,
            )
        rows += _rows(name, turns(calls, repeats))
    log.table(f"one query at {tokens} tokens, n = {repeats}", COLUMNS, rows)
