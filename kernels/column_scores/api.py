"""column_scores: how much attention each cached token receives, without a T x C matrix.

    score[c] = sum over queries t and query heads of a KV head of exp(logit[t, c] - lse[t])

With lse the log of the whole softmax denominator this is the column sum of the attention matrix,
which heavy-hitter eviction accumulates (H2O, arXiv:2306.14048).
"""

from __future__ import annotations

import torch

from kvsmith.errors import explain
from kvsmith.kernels.choice import Impl, preferred
from kvsmith.kernels.column_scores import reference


def column_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Sum the attention that each token receives.

    Args:
        q: [B, H * G, T, D] float, queries; query head h * G + g reads KV head h.
        k: [B, H, C, D] float, keys in the queries' domain (rotated as they are).
        lse: [B, H * G, T] float32, natural log of each query's softmax denominator; a query with
            -inf saw nothing and adds nothing.
        scale: factor on the logits.
        mask: [B or 1, H * G or 1, T or 1, C] bool, true where a query sees a token, or float to add
            to the logits; None for all.
        softcap: logits become softcap * tanh(logits / softcap); None for none.
        impl: who computes it; None for `choice.preferred`, and for the reference with float64 and
            masks of floats.

    Returns:
        [B, H, C] float32, probabilities summed over T queries and G heads.

    Raises:
        ValueError: the shapes do not fit, or triton is asked for a mask of floats.
    """
    if q.shape[1] % k.shape[1] or q.shape[-1] != k.shape[-1] or lse.shape != q.shape[:3]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, lse {tuple(lse.shape)}"
        expected = "q [B, H*G, T, D], k [B, H, C, D], lse [B, H*G, T]"
        raise ValueError(explain("column_scores", "shapes", expected, shapes))
    added = mask is not None and mask.dtype != torch.bool
    if mask is not None and added and impl == "triton":
        raise ValueError(explain("column_scores", "mask", "bool with impl=triton", mask.dtype))
    if impl is None:
        plain = added or k.dtype == torch.float64
        impl = "reference" if plain else preferred(k.device)
    if impl == "reference":
        return reference.column_scores(q, k, lse, scale, mask, softcap)
    from kvsmith.kernels.column_scores import triton

    return triton.column_scores(q, k, lse, scale, mask, softcap)
