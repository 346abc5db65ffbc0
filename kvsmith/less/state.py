"""The state of one layer: R weighted means of the values that were evicted.

LESS keeps H = sum psi(k) v and z = sum psi(k) over evicted tokens and answers a query with
phi(q) H / phi(q) z, weighed phi(q) z beside the softmax denominator of the kept tokens. With
V_r = H_r / z_r this is attention over R tokens with logits log phi_r(q) + log z_r and values V_r,

    lse = logsumexp_r(log phi_r(q) + log z_r),    out = softmax_r(log phi_r(q) + log z_r) V_r,

one more Partial. So the state is stored as V, means of values, which neither grow nor overflow,
and log z; folding further tokens is the same merge. Source: LESS, arXiv:2402.09398, section 3.2.
Differs: z and H in log space and without the small constants of the published code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch

from kvsmith.kernels.partial import Partial
from kvsmith.less.features import FeatureMap

StateDtype = Literal["float16", "float32", "int8"]


class State:
    """What one layer remembers of evicted tokens.

    Args:
        features: the trained maps.
        rank: R.
        store: dtype of the stored values; "int8" has a scale for each of the R.
    """

    def __init__(self, features: FeatureMap, rank: int, store: StateDtype) -> None:
        self.features, self.rank, self.store = features, rank, store
        self.clear()

    def clear(self) -> None:
        """Forget everything and free the memory."""
        self.log_z: torch.Tensor | None = None  # [B, H, R] float32, -inf while empty
        self.values: tuple[torch.Tensor, ...] = ()  # [B, H, R, Dv], and [B, H, R] scales of int8

    def start(self, v: torch.Tensor) -> None:
        """Allocate the state for as many rows and heads as `v` [B, H, T, Dv] has."""
        if self.log_z is None:
            B, H, _, D = v.shape
            self.features.to(v.device)
            self.log_z = v.new_full((B, H, self.rank), float("-inf"), dtype=torch.float32)
            self.values = self._pack(v.new_zeros((B, H, self.rank, D), dtype=torch.float32))

    def fold(self, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> None:
        """Take in evicted tokens; each must come once.

        Args:
            k: [B, H, N, D] keys after RoPE.
            v: [B, H, N, Dv] values.
            valid: [B, H, N] bool, false where a place holds no token.
        """
        self.start(v)
        assert self.log_z is not None
        logits = self.features.log_psi(k).masked_fill(~valid[..., None], float("-inf"))
        new = torch.logsumexp(logits, dim=2)  # [B, H, R]
        log_z = torch.logaddexp(self.log_z, new)
        anchor = log_z.masked_fill(log_z.isneginf(), 0.0)
        kept = torch.exp(self.log_z - anchor)[..., None] * self.means()
        weights = torch.exp(logits - anchor[:, :, None]).transpose(-1, -2)  # [B, H, R, N]
        self.values, self.log_z = self._pack(kept + weights @ v.float()), log_z

    def partial(self, q: torch.Tensor, reader: int = 0) -> Partial:
        """Attention over the state.

        Args:
            q: [B, H * G, T, D] queries after RoPE.
            reader: which of the layers that read this state asks.

        Returns:
            Partial; lse is -inf in rows where nothing was evicted yet.
        """
        assert self.log_z is not None
        B, H, R = self.log_z.shape
        T = q.shape[2]
        logits = (
            self.features.log_phi(q, reader).view(B, H, -1, T, R) + self.log_z[:, :, None, None]
        )
        lse = torch.logsumexp(logits, dim=-1)
        anchor = lse.masked_fill(lse.isneginf(), 0.0)
        weights = torch.exp(logits - anchor[..., None]).flatten(2, 3)  # [B, H, G * T, R]
        out = weights @ self.means()
        return Partial(out.view(B, q.shape[1], T, -1), lse.flatten(1, 2))

    def means(self) -> torch.Tensor:
        """V, [B, H, R, Dv] float32: means of evicted values."""
        values = self.values[0].float()
        return values * self.values[1][..., None] if self.store == "int8" else values

    def _pack(self, means: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.store == "int8":
            scale = means.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / 127
            return (means / scale[..., None]).round().to(torch.int8), scale
        return (means.to(torch.float16 if self.store == "float16" else torch.float32),)

    def map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a row selection or repetition."""
        if self.log_z is not None:
            self.log_z = change(self.log_z)
            self.values = tuple(change(t) for t in self.values)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor as (state | parameters, tensor)."""
        if self.log_z is not None:
            yield from (("state", t) for t in (self.log_z, *self.values))
        yield from (("parameters", t) for t in self.features.tensors.values())
