"""Definition of low_rank in plain torch; the formula stands in `api.py`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
import torch.nn.functional as F

from kvsmith.kernels.format import Factors
from kvsmith.kernels.pack.api import pack, unpack


def fit_low_rank(error: torch.Tensor, fmt: Factors, rank: int) -> dict[str, torch.Tensor]:
    """See `api.fit_low_rank`."""
    blocks = error.unflatten(2, (-1, fmt.block))  # [B, H, n, block, D]
    left, right = _iterate(blocks, rank, fmt.iterations)
    if not fmt.bits:
        limit = torch.finfo(fmt.store).max
        stored = (t.clamp(-limit, limit).to(fmt.store) for t in (left, right))
        return dict(zip(("left", "right"), stored, strict=True))
    left_codes, _ = _quantize(left, fmt.bits)
    left = _values(left_codes, fmt.bits)
    # Its diagonal is of the size of the block; the ridge keeps columns apart that few bits make
    # equal.
    gram = left @ left.mT + 1e-3 * torch.eye(rank, device=left.device)
    right = torch.linalg.solve_ex(gram, left @ blocks)[0]
    right_codes, scale = _quantize(right, fmt.bits)
    return {
        "left": pack(left_codes, fmt.bits),
        "right": pack(right_codes, fmt.bits),
        "factor_scale": scale.clamp(max=torch.finfo(fmt.store).max).to(fmt.store),
    }


def _iterate(blocks: torch.Tensor, rank: int, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal left and least-squares right factors, [..., R, block] and [..., R, D]."""
    start = _start(blocks.shape[-1], rank, blocks.device)
    right = start.expand(*blocks.shape[:-2], *start.shape)
    for _ in range(iterations):
        # Thin factors on the left: several times faster than on the right.
        left = _orthonormal(right @ blocks.mT)
        right = left @ blocks
    return left, right


@lru_cache(maxsize=64)
def _start(dim: int, rank: int, device: torch.device) -> torch.Tensor:
    """Fixed normal numbers [R, D]; a generator of its own leaves torch's random state alone."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rank, dim, generator=generator).to(device)


def _orthonormal(x: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the rows of x [..., R, n]; any basis where they are dependent."""
    return torch.linalg.qr(x.mT)[0].mT


def _quantize(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., R, n] uint8 and largest magnitudes [..., R]."""
    scale = x.abs().amax(-1)
    unit = (x / scale.unsqueeze(-1)).nan_to_num(0.0)
    codes = ((unit + 1) * 2 ** (bits - 1)).floor().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), scale


def _values(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Levels of codes, in (-1, 1) and symmetric."""
    return codes.float().mul_(2.0 ** (1 - bits)).add_(2.0**-bits - 1)


def read_factors(
    tensors: Mapping[str, torch.Tensor], fmt: Factors, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `api.read_factors`."""
    if not fmt.bits:
        return tensors["left"].float(), tensors["right"].float()
    left = _values(unpack(tensors["left"], fmt.bits, fmt.block), fmt.bits)
    right = _values(unpack(tensors["right"], fmt.bits, dim), fmt.bits)
    return left, right.mul_(tensors["factor_scale"].float().unsqueeze(-1))


def add_low_rank(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """See `api.add_low_rank`."""
    R, block = left.shape[-2:]
    blocks = x.view(-1, block, x.shape[-1])
    blocks.baddbmm_(left.reshape(-1, R, block).mT, right.reshape(-1, R, x.shape[-1]))
    return x


def low_rank_logits(q: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """See `api.low_rank_logits`."""
    n, R = left.shape[2:4]
    inner = (q @ right.flatten(2, 3).mT).unflatten(3, (n, R)).transpose(2, 3)  # [B, H, n, M, R]
    return (inner @ left).transpose(2, 3).flatten(3)


def low_rank_values(p: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """See `api.low_rank_values`."""
    n, _, block = left.shape[2:]
    p = F.pad(p, (0, n * block - p.shape[3])).unflatten(3, (n, block)).transpose(2, 3)
    inner = (p @ left.mT).transpose(2, 3).flatten(3)  # [B, H, M, n * R]
    return inner @ right.flatten(2, 3)
