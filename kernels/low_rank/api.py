"""low_rank: the error of a block of tokens, per head, as a product of two thin factors.

    E [block, D] ~ A B^T,  A [block, R],  B [D, R]

Subspace iteration from a fixed start: A = E B, orthonormalise A, B = E^T A. The last B is the
least-squares one for its A, so the product is A A^T E, E projected. Source: GEAR,
arXiv:2403.05527v4, algorithm 2. Differs: A is orthonormalised in every iteration, which changes no
product and keeps float32 from losing the weaker directions, and B never, which spans the same; the
start is fixed, not drawn; factors may be quantized, B then being fitted to the quantized A.

Factors lie component by component, `left` [B, H, T / block, R, block] and `right` [B, H, T / block,
R, D]. Quantized ones have 2^bits levels symmetric around zero, `(2 code + 1) / 2^bits - 1`, and one
scale for both, `factor_scale` [B, H, T / block, R].

Attention uses them by linearity: q (A B^T)^T = (q B) A^T and p (A B^T) = (p A) B^T, block by block.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvsmith.errors import explain
from kvsmith.kernels.format import Factors
from kvsmith.kernels.low_rank import reference

LowRankTerm = tuple[torch.Tensor, torch.Tensor]  # (left, right) as `read_factors` returns them


def fit_low_rank(error: torch.Tensor, fmt: Factors, rank: int) -> dict[str, torch.Tensor]:
    """Factorise what a codec leaves.

    Args:
        error: [B, H, T, D] float32, tokens minus their decoded values; T a multiple of `fmt.block`.
        fmt: block, iterations and storage.
        rank: R, at most block and D.

    Returns:
        `left` [B, H, T / block, R, block] and `right` [B, H, T / block, R, D] in `fmt.store`; or
        both packed to bytes along the last dimension, and `factor_scale` [B, H, T / block, R].

    Raises:
        ValueError: the error holds NaN or infinity, or the rank does not fit.
    """
    if not 1 <= rank <= min(fmt.block, error.shape[3]):
        most = f"between 1 and {min(fmt.block, error.shape[3])}"
        raise ValueError(explain("low_rank", "rank", most, rank))
    if error.shape[2] % fmt.block:
        expected = f"a multiple of block = {fmt.block}"
        raise ValueError(explain("low_rank", "tokens", expected, error.shape[2]))
    tensors = reference.fit_low_rank(error, fmt, rank)
    # A NaN anywhere in a block reaches its factors, which are smaller to look through.
    weight = tensors.get("factor_scale", tensors["right"])
    if not bool(weight.isfinite().all()):
        raise ValueError(explain("low_rank", "keys and values", "finite", "NaN or infinity"))
    return tensors


def read_factors(
    tensors: Mapping[str, torch.Tensor], fmt: Factors, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors as numbers.

    Args:
        tensors: what `fit_low_rank` returned, or a slice of it along the blocks.
        fmt: block and storage.
        dim: channels of a head D.

    Returns:
        (left [B, H, T / block, R, block], right [B, H, T / block, R, D]), float32.
    """
    return reference.read_factors(tensors, fmt, dim)


def add_low_rank(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Add the product of factors to decoded tokens in place.

    Args:
        x: [B, H, T, D] float32, contiguous.
        left, right: as `read_factors` returns them, channels in the order of x.

    Returns:
        x.
    """
    return reference.add_low_rank(x, left, right)


def low_rank_logits(q: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """What the low-rank term of keys adds to logits.

    Args:
        q: [B, H, M, D] float32, scaled queries.
        left, right: as `read_factors` returns them, channels in the order of q.

    Returns:
        [B, H, M, T] float32.
    """
    return reference.low_rank_logits(q, left, right)


def low_rank_values(p: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """What the low-rank term of values adds to outputs.

    Args:
        p: [B, H, M, C] float32, weights of the first C <= T tokens.
        left, right: as `read_factors` returns them.

    Returns:
        [B, H, M, D] float32.
    """
    return reference.low_rank_values(p, left, right)
