"""Arguments and grid of the kernel."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from kvsmith.kernels.attend_encoded.api import Body, Logits, Rope, Side, Window, tile_tokens
from kvsmith.kernels.attend_encoded.reference import attend_windows
from kvsmith.kernels.partial import Partial

# Corrections of a block that are read at once; the mean is 20 at 1 % and blocks of 16 x 128.
CORRECTIONS = 32
# Tensors of a page.
PARTS = ("codes", "scale", "zero", "index", "value", "start", "left", "right", "factor_scale")
# Columns are counted in 32 bits.
MAX_COLUMN = (1 << 31) - 1
# Programs that share a row and head at most, and tokens that are worth a program.
MAX_SPLITS, TOKENS_EACH = 256, 512


def attend_encoded(
    q: torch.Tensor,
    body: Body,
    sinks: Window,
    recent: Window,
    query: int,
    logits: Logits,
    rope: Rope | None,
    first: torch.Tensor | None,
    counts: torch.Tensor | None,
    windows: bool,
) -> Partial:
    """See `api.attend_encoded`."""
    if body.k.turn is None and body.v.turn is None:
        return _launch(q, body, sinks, recent, query, logits, rope, first, counts, windows)
    own = q if body.k.turn is None else turned(q, body.k.turn)
    part = _launch(own, body, sinks, recent, query, logits, rope, first, counts, False)
    if body.v.turn is not None:
        part = Partial(turned(part.out, body.v.turn.mT), part.lse)
    if not windows:
        return part
    # The dense windows are in another basis than the body: few tokens, attended apart.
    return part.merge(attend_windows(q, sinks, recent, query, logits, rope, first))


def turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """[B, Hq, T, D] times the matrix of each KV head, [H or 1, D, D]."""
    grouped = x.float().unflatten(1, (len(turn), -1))
    return (grouped @ turn[:, None]).flatten(1, 2).to(x.dtype)


def _launch(
    q: torch.Tensor,
    body: Body,
    sinks: Window,
    recent: Window,
    query: int,
    logits: Logits,
    rope: Rope | None,
    first: torch.Tensor | None,
    counts: torch.Tensor | None,
    windows: bool,
) -> Partial:
    """Both kernels; without `windows` over the encoded tokens alone."""
    from kvsmith.kernels.attend.triton import merge_kernel
    from kvsmith.kernels.attend_encoded import triton as kernels

    B, Hq, T_NEW, _ = q.shape
    H, DV = body.heads, body.v.dim
    R, device = Hq // H * T_NEW, q.device
    splits = count_splits(body.stop - body.begin, B * H, device)
    zeros = torch.zeros(max(B, Hq), dtype=torch.float32, device=device)
    none = torch.zeros(B, dtype=torch.int64, device=device)
    start = none if first is None else first
    if counts is None:
        numbers = [body.stop, body.begin, query, recent.start, recent.count]
        counts = torch.tensor(numbers, dtype=torch.int64, device=device)
    parts = torch.empty((B * H, splits + 1, R, DV), dtype=torch.float32, device=device)
    logs = torch.empty((B * H, splits + 1, R), dtype=torch.float32, device=device)
    turns = rope.turns if rope is not None else none.double()
    tensors = (*_tables(body.k), *_tables(body.v))
    at = _positions(sinks, recent, none)
    if not windows:
        parts[:, splits], logs[:, splits] = 0, float("-inf")
    kernels.attend_kernel[(B, H, splits + windows)](
        q.contiguous(),
        parts,
        logs,
        page_table(body, device),
        counts,
        start,
        none if rope is None else rope.shift,
        turns,
        zeros if logits.slopes is None else logits.slopes,
        *tensors,
        sinks.k,
        sinks.v,
        at[0],
        recent.k,
        recent.v,
        at[1],
        logits.scale,
        1.0 if rope is None else rope.scale,
        logits.softcap or 0.0,
        MAX_COLUMN if logits.window is None else min(logits.window, MAX_COLUMN),
        body.pages[0].sides[0]["codes"].stride(0) if body.pages else 0,
        int(at[0].dim() == 2 and len(at[0]) > 1),
        splits,
        **constants(body, q, (sinks.k.shape[2], recent.k.shape[2]), rope, logits, backend()),
        WIDE=kernels.interpreting() and q.dtype == torch.bfloat16,
        SHUFFLES=_shuffles(device),
        **options(body, R, backend()),
    )
    out = torch.empty((B, Hq, T_NEW, DV), dtype=torch.float32, device=device)
    lse = torch.empty((B, Hq, T_NEW), dtype=torch.float32, device=device)
    merge_kernel[(B * H, R)](parts, logs, out, lse, splits + 1, R=R, DV=DV, WIDTH=power(DV))
    return Partial(out, lse)


def _positions(sinks: Window, recent: Window, none: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Position ids of both windows with as many rows each."""
    a, b = sinks.positions, recent.positions
    if a is None or b is None:
        return none, none
    rows = max(len(a), len(b))
    return a.expand(rows, -1).contiguous(), b.expand(rows, -1).contiguous()


def count_splits(tokens: int, rows: int, device: torch.device) -> int:
    """Programs among which the tokens of a row and head are shared."""
    processors = 132
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    # Eight programs of a warp fill a processor's registers.
    wanted = -(-8 * processors // rows)
    return max(1, min(wanted, -(-tokens // TOKENS_EACH), MAX_SPLITS))


def page_table(body: Body, device: torch.device) -> torch.Tensor:
    """Addresses of the pages, [pages] int64 (one that is never read where there is none)."""
    if body.table is not None:
        return body.table
    found = [page.sides[0]["codes"].data_ptr() for page in body.pages]
    return torch.tensor(found or [0], dtype=torch.int64, device=device)


def _tables(side: Side) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codebook and calibrated ranges; the codebook stands in for ranges that there are not."""
    t = side.tables
    lut = t.lut
    return lut, lut if t.scale is None else t.scale, lut if t.zero is None else t.zero


def constants(
    body: Body,
    q: torch.Tensor,
    room: tuple[int, int],
    rope: Rope | None,
    logits: Logits,
    backend: str,
) -> dict[str, Any]:
    """Everything that the kernel is compiled for; `room` is that of the two windows."""
    from kvsmith.kernels.attend_encoded.triton import STORE

    fmt, D, DV = body.k.format, body.k.dim, body.v.dim
    T_NEW = q.shape[2]
    R = q.shape[1] // body.heads * T_NEW
    light = max(D, DV) <= 128 and {fmt.bits, body.v.format.bits} <= {2, 4}
    out: dict[str, Any] = {
        "H": body.heads,
        "R": R,
        "T_NEW": T_NEW,
        "M": padded_rows(R, backend),
        "T": _tile(body),
        "D": D,
        "HALF": max(16, power(D // 2)),
        "DV": DV,
        "HALF_V": max(16, power(DV // 2)),
        "PAGE": body.page_size,
        "BLOCK": fmt.block,
        # Half where registers would spill; on AMD a gather needs the rows of a warp.
        "EC": 64 if backend == "hip" else CORRECTIONS // (1 if light else 2),
        "SINKS": room[0],
        "ROOM": room[1],
        "PRECISION": "ieee" if backend == "hip" else "tf32",
        "ROPE": rope is not None,
        "HAS_CAP": logits.softcap is not None,
        "STORE": STORE[str(fmt.store)],
        # Decoded tiles have the precision of halves; bfloat16 has less.
        "F": STORE["torch.float32" if q.dtype == torch.float32 else "torch.float16"],
    }
    base = body.pages[0].sides[0]["codes"].data_ptr() if body.pages else 0
    for i, (name, side) in enumerate((("K", body.k), ("V", body.v))):
        f = side.format
        kind = "calibrated" if side.tables.scale is not None else str(f.axis)
        kind = "group" if kind == "token" and f.group else kind
        out |= {
            f"{name}_BITS": f.bits,
            f"{name}_UNIFORM": side.tables.uniform,
            f"{name}_KIND": kind,
            f"{name}_GROUP": f.group,
            f"{name}_SLOTS": f.slots,
            f"{name}_RANK": side.rank,
            f"{name}_FACTOR_BITS": side.factors.bits if side.factors else 0,
        }
        tensors = body.pages[0].sides[i] if body.pages else {}
        for part in PARTS:
            place = tensors[part].data_ptr() - base if part in tensors else 0
            out[f"{name}_{part.upper()}"] = place
    return out


def backend() -> str:
    """Which compiler the launches of this process use."""
    return "hip" if torch.version.hip else "cuda"


def _shuffles(device: torch.device) -> bool:
    """Whether levels are looked up by shuffles: on CUDA, where that was seen to work."""
    if backend() != "cuda" or device.type != "cuda":
        return False
    if torch.cuda.is_current_stream_capturing():
        return True  # seen in the call before that warmed up
    return shuffles_work(device)


@lru_cache(maxsize=64)
def shuffles_work(device: torch.device, SHUFFLES: bool = True) -> bool:
    """Whether the lookup by shuffles, which no interpreter runs, gives the levels of a codebook."""
    from kvsmith.kernels.decode.triton import lookup_kernel

    numbers = torch.arange(32 * 16, device=device).view(32, 16)
    for bits in (4, 3, 2, 1):
        lut = torch.arange(1.0, 1 + 2**bits, device=device)
        found = torch.zeros((32, 16), device=device)
        lookup_kernel[(1,)](lut, found, BITS=bits, SHUFFLES=SHUFFLES, num_warps=1)
        if not torch.equal(found, lut[numbers % 2**bits]):
            return False
    return True


def _tile(body: Body) -> int:
    """Tokens of a tile. Columns of a low-rank term are read once a tile, of a block at most."""
    ranked = body.k.factors is not None or body.v.factors is not None
    tokens = tile_tokens(body, min(64, body.k.format.block) if ranked else 16)
    assert tokens is not None
    return tokens


def padded_rows(R: int, backend: str) -> int:
    """Columns of logits for R queries: what a tensor core multiplies by at least."""
    return max(8 if backend == "cuda" else 16, power(R))


def options(body: Body, R: int, backend: str) -> dict[str, int]:
    """Warps and stages of a launch; not tuned on a GPU yet.

    One warp a program where its registers hold the queries and tables: it waits for nobody.
    """
    if backend == "hip":
        return {"num_warps": 4, "num_stages": 2}
    sides = (body.k, body.v)
    least = max(padded_rows(R, backend), _tile(body) // 2) // 8
    if any(x.dim & (x.dim - 1) or x.dim > 128 or x.format.bits not in (2, 3, 4) for x in sides):
        least = max(least, 4)
    if any(x.format.bits == 3 and x.format.slots for x in sides):
        least = max(least, 2)
    return {"num_warps": min(least, 8), "num_stages": 1}


def power(n: int) -> int:
    """The power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
