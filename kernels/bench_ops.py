"""What the benchmark runs: shapes, and one case an op with its check, its calls and its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kvsmith.kernels.bench_time import Call, copies_beyond_cache, time_calls
from kvsmith.kernels.column_scores.api import column_scores
from kvsmith.kernels.encode_pack.api import encode_pack
from kvsmith.kernels.format import Format, Tables


@dataclass(frozen=True)
class Shape:
    """Heads of a published model, rows and cached tokens.

    Attributes:
        model: whose heads.
        heads, kv_heads, dim: query heads, KV heads H, channels of a head D.
        batch: rows B.
        tokens: cached tokens of the longest row.
    """

    model: str
    heads: int
    kv_heads: int
    dim: int
    batch: int
    tokens: int

    @property
    def dense_bytes(self) -> int:
        """Keys and values of one layer in bfloat16."""
        return 4 * self.batch * self.tokens * self.kv_heads * self.dim

    def __str__(self) -> str:
        return f"{self.model} B={self.batch} {self.tokens >> 10}K"


MODELS = {"llama-3-8b": (32, 8, 128), "llama-2-7b": (32, 32, 128), "qwen3-32b": (64, 8, 128)}
LENGTHS = (32 << 10, 128 << 10, 512 << 10, 1 << 20)
BATCHES = (1, 8, 32)


def shapes(quick: bool, memory: int) -> Iterator[Shape]:
    """Shapes whose dense cache takes at most a third of the memory; `quick`: one model, batch 1."""
    for model, (heads, kv_heads, dim) in MODELS.items():
        for batch in BATCHES:
            for tokens in LENGTHS:
                shape = Shape(model, heads, kv_heads, dim, batch, tokens)
                wanted = not quick or (model == "llama-3-8b" and batch == 1 and tokens < 1 << 19)
                if wanted and shape.dense_bytes <= memory // 3:
                    yield shape


def formats(kv_heads: int, dim: int) -> Iterator[tuple[str, Format]]:
    """Keys and values with 1 % outliers at 4 and 2 bits."""
    slots = round(0.01 * kv_heads * dim)
    for bits in (4, 2):
        yield "k", Format(bits, "channel", 0, slots, "error", torch.float16)
        yield "v", Format(bits, "token", 0, slots, "extremes", torch.float16)


def tables_of(fmt: Format, kv_heads: int, dim: int, device: torch.device) -> Tables:
    """A uniform codebook and ranges for normal inputs."""
    lut = torch.linspace(-1, 1, 2**fmt.bits)
    ranges = (torch.full((kv_heads, dim), 2.5), torch.zeros(kv_heads, dim))
    calibrated = fmt.axis == "channel" and not fmt.group
    tables = Tables(lut, (lut[1:] + lut[:-1]) / 2, *(ranges if calibrated else (None, None)))
    return tables.to(device)


def check_encode_pack(device: torch.device) -> str:
    """What differs from the reference on a small input; empty for nothing."""
    # The interpreter is slow.
    B, H, T, D = (2, 8, 256, 128) if device.type == "cuda" else (1, 2, 16, 32)
    for side, fmt in formats(H, D):
        x = torch.randn(B, H, T, D, generator=torch.Generator().manual_seed(0))
        tables = tables_of(fmt, H, D, torch.device("cpu"))
        want = encode_pack(x, fmt, tables, impl="reference")
        got = encode_pack(x.to(device), fmt, tables.to(device), impl="triton")
        for name, tensor in want.items():
            if not torch.equal(got[name].cpu(), tensor):
                return f"{side} {fmt.bits} bits: {name} differs from the reference"
    return ""


def check_column_scores(device: torch.device) -> str:
    """What differs from the reference on a small input; empty for nothing."""
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(1, 8, 3, 128, generator=generator),
        torch.randn(1, 2, 300, 128, generator=generator),
    )
    logits = q.view(1, 2, 12, 128) @ k.transpose(-1, -2) * 0.1
    lse = logits.logsumexp(-1).view(1, 8, 3)
    want = column_scores(q, k, lse, scale=0.1, impl="reference")
    moved = [x.to(device) for x in (q, k, lse)]
    got = column_scores(moved[0], moved[1], moved[2], scale=0.1, impl="triton").cpu()
    error = float((got - want).abs().max())
    # Float32 products of 128 terms and their exponentials.
    return "" if error <= 1e-4 else f"error {error:.1e} against the reference"


def encode_rows(shape: Shape, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """One row a side and width: a page of tokens, of which a long prompt is made."""
    tokens = min(shape.tokens, 4096)
    size = (shape.batch, shape.kv_heads, tokens, shape.dim)
    for side, fmt in formats(shape.kv_heads, shape.dim):
        tables = tables_of(fmt, shape.kv_heads, shape.dim, device)
        count = copies_beyond_cache(2 * shape.batch * shape.kv_heads * tokens * shape.dim)
        inputs = [torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(count)]
        result = encode_pack(inputs[0], fmt, tables)
        nbytes = inputs[0].nbytes + sum(t.nbytes for t in result.values())
        taken = time_calls([_encoding(x, fmt, tables) for x in inputs], device, seconds)
        yield {"op": f"encode_pack {side}", "bits": fmt.bits, "bytes": nbytes, "time": taken}


def _encoding(x: torch.Tensor, fmt: Format, tables: Tables) -> Call:
    return lambda: encode_pack(x, fmt, tables)


def column_rows(shape: Shape, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """One decoding step's queries against dense bfloat16 keys."""
    size = (shape.batch, shape.kv_heads, shape.tokens, shape.dim)
    k = torch.randn(size, device=device, dtype=torch.bfloat16)
    q = torch.randn(shape.batch, shape.heads, 1, shape.dim, device=device, dtype=torch.bfloat16)
    lse = torch.full((shape.batch, shape.heads, 1), 12.0, device=device)
    taken = time_calls([lambda: column_scores(q, k, lse, scale=0.088)], device, seconds)
    nbytes = k.nbytes + 4 * shape.batch * shape.kv_heads * shape.tokens
    yield {"op": "column_scores", "bits": 16, "bytes": nbytes, "time": taken}
