"""Triton kernel of column_scores: one program owns a tile of cached tokens and walks the queries.

Nothing is added atomically, so equal inputs give equal bytes. The query heads of a KV head stand
below one another, so that a tile of keys is read once and meets all of them in one product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvsmith.kernels.aot import Variant

COLUMNS = 64  # cached tokens of a program


@triton.jit
def column_kernel(
    p_q, s_qb, s_qh, s_qt, p_k, s_kb, s_kh, s_kc, p_lse, s_lb, s_lh, p_mask, s_mb, s_mh, s_mt,
    p_out, scale, softcap, T, C, G, H,
    D: tl.constexpr, DP: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Columns [i_c * CP, ...) of one KV head; RP rows (query, head of the group) at a time."""
    i_b, i_h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_c, o_d = tl.program_id(0) * CP + tl.arange(0, CP), tl.arange(0, DP)
    m_c, m_d = o_c < C, o_d < D
    p_key = p_k + i_b * s_kb + i_h * s_kh + o_c.to(tl.int64)[None, :] * s_kc + o_d[:, None]
    k = tl.load(p_key, mask=m_d[:, None] & m_c[None, :], other=0.0)  # [DP, CP]
    total = tl.zeros((CP,), tl.float32)
    for i_r in range(0, T * G, RP):
        o_r = i_r + tl.arange(0, RP)
        t, head = (o_r // G).to(tl.int64), i_h * G + o_r % G
        m_r = o_r < T * G
        p_row = p_q + i_b * s_qb + head * s_qh + t * s_qt
        q = tl.load(p_row[:, None] + o_d[None, :], mask=m_r[:, None] & m_d[None, :], other=0.0)
        lse = tl.load(p_lse + i_b * s_lb + head * s_lh + t, mask=m_r, other=float("inf"))
        # A query that saw nothing has -inf; +inf makes all of its probabilities 0.
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        logits = tl.dot(q, k, input_precision="ieee") * scale
        if HAS_CAP:
            # tanh(x) = 1 - 2 / (e^2x + 1), exact at both ends.
            logits = softcap * (1 - 2 / (tl.exp(2 * logits / softcap) + 1))
        seen = m_r[:, None] & m_c[None, :]
        if HAS_MASK:
            p_seen = p_mask + i_b * s_mb + head * s_mh + t * s_mt
            seen = seen & (tl.load(p_seen[:, None] + o_c[None, :], mask=seen, other=0) != 0)
        total += tl.sum(tl.exp(tl.where(seen, logits - lse[:, None], float("-inf"))), 0)
    tl.store(p_out + (i_b * H + i_h) * C + o_c, total, mask=m_c)


def column_shape(queries: int, dim: int, masked: bool, capped: bool) -> dict[str, int]:
    """Constants of the kernel; `queries` = T * G rows."""
    DP = max(16, triton.next_power_of_2(dim))
    RP = min(max(16, triton.next_power_of_2(queries)), 64 if DP <= 128 else 32)
    return {"D": dim, "DP": DP, "CP": COLUMNS, "RP": RP, "HAS_MASK": masked, "HAS_CAP": capped}


def column_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """See `api.column_scores`."""
    B, Hq, T, D = q.shape
    H, C = k.shape[1], k.shape[2]
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q.to(k.dtype), k))
    if q.dtype == torch.bfloat16 and not q.is_cuda:
        # The interpreter multiplies bfloat16 as integers.
        q, k = q.float(), k.float()
    lse = lse.float().contiguous()
    seen = lse if mask is None else mask.contiguous().expand(B, Hq, T, C).view(torch.uint8)
    out = torch.empty((B, H, C), dtype=torch.float32, device=q.device)
    shape = column_shape(T * Hq // H, D, mask is not None, softcap is not None)
    column_kernel[(triton.cdiv(C, COLUMNS), H, B)](
        q, *q.stride()[:3], k, *k.stride()[:3], lse, *lse.stride()[:2],
        seen, *seen.stride()[:3], out, scale, softcap or 1.0, T, C, Hq // H, H,
        **shape, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def variants() -> list[Variant]:
    """Decoding and prefill, with and without mask and cap, at published head dims."""
    cases = [
        ("bf16", rows, dim, masked, capped)
        for rows, dim in ((4, 128), (1024, 128), (64, 64), (8, 256))
        for masked, capped in ((False, False), (True, True))
    ]
    cases += [("fp16", 4, 80, False, False), ("fp32", 4, 96, True, False)]
    return [_variant(*case) for case in cases]


def _variant(dtype: str, rows: int, dim: int, masked: bool, capped: bool) -> Variant:
    shape = column_shape(rows, dim, masked, capped)
    signature = {n: "i32" for n in column_kernel.arg_names if n not in shape}
    signature |= {n: "i32:16" for n in signature if n[:3] in ("s_q", "s_k")}
    signature |= {"p_q": f"*{dtype}:16", "p_k": f"*{dtype}:16", "p_lse": "*fp32:16"}
    signature |= {"p_mask": "*u8:16", "p_out": "*fp32:16", "scale": "fp32", "softcap": "fp32"}
    name = f"{rows} rows, D {dim} {dtype}{' mask' * masked}{' cap' * capped}"
    return Variant("column_scores", name, column_kernel, signature, shape, 4, 2)
