"""attend_encoded against the best of torch's attention on a dense bfloat16 cache, in one run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvsmith.kernels.attend_encoded.api import Body, Logits, Rope, Side, Window, attend_encoded
from kvsmith.kernels.bench_ops import Shape, formats, tables_of
from kvsmith.kernels.bench_time import best_sdpa, copies_beyond_cache, time_calls
from kvsmith.kernels.encode_pack.api import encode_pack
from kvsmith.kernels.format import Format

PAGE, SINKS, RECENT, BLOCK = 128, 4, 32, 16
ALIGN = 16


@dataclass(frozen=True)
class StoredPage:
    """Views of a page's tensors; see `api.EncodedPage`."""

    sides: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """Arguments of attend_encoded for one set of memory.

    Attributes:
        nbytes: stored bytes of the body and the windows.
    """

    q: torch.Tensor
    body: Body
    sinks: Window
    recent: Window
    query: int
    logits: Logits
    rope: Rope
    first: torch.Tensor | None
    counts: torch.Tensor
    nbytes: int

    def __call__(self, impl: Any = "triton") -> torch.Tensor:
        """[B, Hq, 1, D] float32."""
        return attend_encoded(
            self.q,
            self.body,
            self.sinks,
            self.recent,
            self.query,
            self.logits,
            rope=self.rope,
            first=self.first,
            counts=self.counts if impl == "triton" else None,
            impl=impl,
        ).out


def make_case(
    shape: Shape, sides: tuple[Format, Format], device: torch.device, dtype: torch.dtype
) -> Case:
    """A layer of normal tokens before RoPE; rows beyond the first are ragged, padded on the left.

    Pages hold the same tokens in memory of their own: how long reading takes does not depend on
    what they say.
    """
    B, H, D = shape.batch, shape.kv_heads, shape.dim
    encoded = (shape.tokens - SINKS - RECENT) // BLOCK * BLOCK
    count = -(-encoded // PAGE)
    x = torch.randn((B, H, PAGE, D), device=device, dtype=dtype)
    parts = [(side, tables_of(side, H, D, device)) for side in sides]
    one, places = _page([encode_pack(x, *part) for part in parts])
    memory = one.expand(count, -1, -1).contiguous()
    pages = [StoredPage(_views(row, places)) for row in memory]
    addresses = memory.data_ptr() + memory.stride(0) * torch.arange(max(count, 1))
    k, v = (Side(*part, D) for part in parts)
    body = Body(pages, addresses.to(device), H, PAGE, 0, encoded, k, v)
    start = SINKS + encoded
    tail, room = shape.tokens - start, RECENT + BLOCK
    first = None if B == 1 else ragged(shape, device)
    shift = torch.zeros(B, dtype=torch.int64, device=device) if first is None else -first
    own = torch.arange(SINKS, device=device).expand(B, -1).contiguous()
    recent_at = torch.arange(start, start + room, device=device) + shift[:, None]
    dense = [torch.randn((B, H, n, D), device=device, dtype=dtype) for n in (SINKS, room)]
    numbers = (encoded, 0, shape.tokens - 1, start, tail)
    frequency = 500000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    return Case(
        torch.randn((B, shape.heads, 1, D), device=device, dtype=dtype),
        body,
        Window(dense[0], dense[0], own, 0, SINKS),
        Window(dense[1], dense[1], recent_at.contiguous(), start, tail),
        shape.tokens - 1,
        Logits(D**-0.5),
        Rope((frequency / (2 * math.pi)).to(device), 1.0, shift),
        first,
        torch.tensor(numbers, dtype=torch.int64, device=device),
        memory.nbytes * encoded // max(count * PAGE, 1) + 4 * B * H * D * (SINKS + tail),
    )


def ragged(shape: Shape, device: torch.device) -> torch.Tensor:
    """[B] int64 left padding: rows from half of the tokens to all of them, in even steps."""
    steps = torch.linspace(0.5, 0.0, shape.batch, device=device)
    return (steps * shape.tokens).long()


def _page(
    sides: list[dict[str, torch.Tensor]],
) -> tuple[torch.Tensor, list[dict[str, tuple[int, torch.Tensor]]]]:
    """One buffer [B, bytes] with the tensors of both sides, and where each of them lies."""
    at, rows, places = 0, [], []
    for tensors in sides:
        own = {}
        for name, tensor in tensors.items():
            raw = tensor.flatten(1).contiguous().view(torch.uint8)
            own[name] = (at, tensor)
            spare = -raw.shape[1] % ALIGN
            rows.append(torch.nn.functional.pad(raw, (0, spare)))
            at += raw.shape[1] + spare
        places.append(own)
    return torch.cat(rows, dim=1), places


def _views(buffer: torch.Tensor, places: list[dict[str, tuple[int, torch.Tensor]]]) -> Any:
    """Tensors of both sides as views of a buffer [B, bytes]."""
    return tuple(
        {
            name: buffer[:, at : at + like[0].nbytes].view(like.dtype).unflatten(1, like.shape[1:])
            for name, (at, like) in own.items()
        }
        for own in places
    )


def codecs(kv_heads: int, dim: int) -> Iterator[tuple[str, tuple[Format, Format]]]:
    """Keys and values at 4 and 2 bits, with 1 % outliers and without."""
    found = [fmt for _, fmt in formats(kv_heads, dim)]
    for k, v in zip(found[::2], found[1::2], strict=True):
        yield "1%", (k, v)
        yield "", (replace(k, slots=0, outliers="none"), replace(v, slots=0, outliers="none"))


def check_attend(device: torch.device) -> str:
    """What differs from the reference on a small input; empty for nothing."""
    torch.manual_seed(0)
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    # The interpreter is slow.
    heads, kv_heads, dim, tokens = (32, 8, 128, 1333) if on_gpu else (4, 2, 32, 133)
    shape = Shape("llama-3-8b", heads, kv_heads, dim, 2, tokens)
    for name, sides in codecs(shape.kv_heads, shape.dim):
        case = make_case(shape, sides, device, dtype)
        got, want = case("triton"), case("reference")
        error = float((got - want).abs().max() / want.std())
        # The reference multiplies in float32; bfloat16 operands keep 8 bits.
        if not error < (0.05 if dtype == torch.bfloat16 else 1e-4):
            return f"{name} {sides[0].bits} bits: error {error:.1e} of the reference's spread"
    return ""


def attend_rows(shape: Shape, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """One row a width, with and without outliers, beside the best dense attention."""
    dense = best_dense(shape, device, seconds)
    for name, sides in codecs(shape.kv_heads, shape.dim):
        first = make_case(shape, sides, device, torch.bfloat16)
        more = range(copies_beyond_cache(first.nbytes) - 1)
        cases = [first, *(make_case(shape, sides, device, torch.bfloat16) for _ in more)]
        taken = time_calls(cases, device, seconds)
        row: dict[str, Any] = {"op": f"attend {name}".strip(), "bits": sides[0].bits}
        row |= {"bytes": first.nbytes, "time": taken}
        if dense is not None:
            against = {"dense": dense[0], "dense_p50": dense[1].p50, "dense_n": dense[1].n}
            row |= against | {"speedup": dense[1].p50 / taken.p50}
        yield row
        del cases, first


def best_dense(shape: Shape, device: torch.device, seconds: float) -> Any:
    """See `bench_time.best_sdpa`; ragged rows are masked, as a padded batch is in a dense cache."""
    size = (shape.batch, shape.kv_heads, shape.tokens, shape.dim)
    sets = []
    for _ in range(copies_beyond_cache(shape.dense_bytes)):
        q = torch.randn(shape.batch, shape.heads, 1, shape.dim, device=device, dtype=torch.bfloat16)
        k, v = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(2))
        sets.append((q, k, v))
    mask = None
    if shape.batch > 1:
        columns = torch.arange(shape.tokens, device=device)
        mask = (columns >= ragged(shape, device)[:, None])[:, None, None]
    return best_sdpa(sets, mask, seconds)
