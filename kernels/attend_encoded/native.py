"""attend_encoded on a CPU: `native.c` reads the body in place, torch attends to the dense windows.

The C compiler of the machine builds it when it is first wanted, for this processor and head dim,
which takes a second; without one there is no native implementation. Rows, KV heads and runs of
pages are shared among as many threads as torch has: ctypes releases the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, reduce
from pathlib import Path

import torch

from kvsmith.kernels.attend_encoded.api import Body, Logits, Rope, Window, tile_tokens
from kvsmith.kernels.attend_encoded.launch import PARTS, page_table, turned
from kvsmith.kernels.attend_encoded.reference import attend_windows
from kvsmith.kernels.partial import Partial

# Sums may be reordered to fill vectors; infinities keep their meaning.
FLAGS = ["-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-fassociative-math"]
FLAGS += ["-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]
STORES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("calibrated", "token", "group", "channel")
# As native.c bounds them.
MAX_RANK, MAX_BLOCK = 64, 256
_SHAPE = ("bits", "dim", "kind", "group", "slots", "store", "rank", "width")


class _Side(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in PARTS),
        *((n, ctypes.c_void_p) for n in ("lut", "all_scale", "all_zero")),
        *((n, ctypes.c_int64) for n in _SHAPE),
    ]


_POINTERS = ("pages", "q", "turns", "shift", "first", "slopes", "out", "lse")
_NUMBERS = ("heads", "rows", "each", "splits", "row_bytes", "page", "tile", "block")
_PLACES = ("begin", "stop", "sinks", "query", "window")


class _Task(ctypes.Structure):
    _fields_ = [
        ("k", _Side),
        ("v", _Side),
        *((n, ctypes.c_void_p) for n in _POINTERS),
        *((n, ctypes.c_int64) for n in (*_NUMBERS, *_PLACES)),
        ("cap", ctypes.c_double),
    ]


@lru_cache(maxsize=32)
def library(k_dim: int, v_dim: int) -> ctypes.CDLL | None:
    """The compiled code for heads of so many channels; None where this machine cannot build it."""
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is None:
        return None
    source = Path(__file__).with_name("native.c")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "native.so"
        sizes = [f"-DK_DIM={k_dim}", f"-DV_DIM={v_dim}"]
        command = [compiler, *FLAGS, *sizes, "-o", str(target), str(source), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            return ctypes.CDLL(str(target))
        except (OSError, subprocess.SubprocessError):
            return None


def unsupported(body: Body, q: torch.Tensor) -> str | None:
    """Why `native.c` cannot read a layer that `api.unsupported` lets pass, or is not there; None
    where it can.
    """
    if q.device.type != "cpu" or q.dtype == torch.float64:
        return f"{q.dtype} on {q.device}"
    for side in (body.k, body.v):
        if side.dim % 16:
            return f"head dim {side.dim}"
        if side.factors and (side.rank > MAX_RANK or side.factors.block > MAX_BLOCK):
            return f"rank {side.rank} in blocks of {side.factors.block}"
        if side.factors and side.factors.bits and side.factors.block % 8:
            return f"factors of {side.factors.bits} bits in blocks of {side.factors.block}"
    return "no C compiler" if library(body.k.dim, body.v.dim) is None else None


def attend_encoded(
    q: torch.Tensor,
    body: Body,
    sinks: Window,
    recent: Window,
    query: int,
    logits: Logits,
    rope: Rope | None,
    first: torch.Tensor | None,
    windows: bool,
) -> Partial:
    """See `api.attend_encoded`."""
    parts = []
    if windows:
        parts.append(attend_windows(q, sinks, recent, query, logits, rope, first))
    if body.stop > body.begin:
        if body.k.turn is not None:
            q = turned(q, body.k.turn)
        runs = _body_partials(q, body, sinks.k.shape[2], query, logits, rope, first)
        whole = reduce(Partial.merge, runs)
        if body.v.turn is not None:
            whole = Partial(turned(whole.out, body.v.turn.mT), whole.lse)
        parts.append(whole)
    return reduce(Partial.merge, parts)


def _body_partials(
    q: torch.Tensor,
    body: Body,
    sinks: int,
    query: int,
    logits: Logits,
    rope: Rope | None,
    first: torch.Tensor | None,
) -> list[Partial]:
    """Of the encoded tokens, one a run of pages."""
    code = library(body.k.dim, body.v.dim)
    assert code is not None
    B, Hq, T, D = q.shape
    H, DV, threads = body.heads, body.v.dim, torch.get_num_threads()
    splits = max(1, min(-(-threads // (B * H)), len(body.pages)))
    factor = logits.scale * (1.0 if rope is None else rope.scale)
    out = torch.empty((B, H, splits, Hq // H * T, DV), dtype=torch.float32)
    lse = torch.empty((B, H, splits, Hq // H * T), dtype=torch.float32)
    slopes = logits.slopes
    held = {
        "pages": page_table(body, q.device),
        "q": (q.float() * factor).contiguous(),
        "turns": None if rope is None else rope.turns,
        "shift": torch.zeros(B, dtype=torch.int64) if rope is None else rope.shift,
        "first": torch.zeros(B, dtype=torch.int64) if first is None else first,
        "slopes": None if slopes is None else slopes.repeat_interleave(T),
        "out": out,
        "lse": lse,
    }
    page = body.pages[0].sides[0]
    task = _Task(
        k=_side(body, 0),
        v=_side(body, 1),
        **{n: None if t is None else t.data_ptr() for n, t in held.items()},
        heads=H,
        rows=Hq // H * T,
        each=T,
        splits=splits,
        row_bytes=page["codes"].stride(0),
        page=body.page_size,
        tile=tile_tokens(body),
        block=body.k.format.block,
        begin=body.begin,
        stop=body.stop,
        sinks=sinks,
        query=query,
        window=1 << 62 if logits.window is None else logits.window,
        cap=logits.softcap or 0.0,
    )
    where = ctypes.byref(task)
    numbers = map(ctypes.c_int64, range(B * H * splits))
    share = map if threads == 1 else _pool(threads, os.getpid()).map
    list(share(lambda n: code.attend_body(where, n), numbers))
    runs = zip(out.unbind(2), lse.unbind(2), strict=True)
    return [Partial(o.reshape(B, Hq, T, DV), s.reshape(B, Hq, T)) for o, s in runs]


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork: every process has its own."""
    return ThreadPoolExecutor(threads, "attend")


def _side(body: Body, i: int) -> _Side:
    side, tensors = (body.k, body.v)[i], body.pages[0].sides[i]
    fmt, tables = side.format, side.tables
    base = body.pages[0].sides[0]["codes"].data_ptr()
    kind = "calibrated" if tables.scale is not None else str(fmt.axis)
    return _Side(
        **{n: tensors[n].data_ptr() - base for n in PARTS if n in tensors},
        lut=tables.lut.data_ptr(),
        all_scale=None if tables.scale is None else tables.scale.data_ptr(),
        all_zero=None if tables.zero is None else tables.zero.data_ptr(),
        bits=fmt.bits,
        dim=side.dim,
        kind=KINDS.index("group" if kind == "token" and fmt.group else kind),
        group=fmt.group,
        slots=fmt.slots,
        store=STORES.index(fmt.store),
        rank=side.rank,
        width=side.factors.bits if side.factors else 0,
    )
