"""A TensorCodec with its parameters: encodes blocks of tokens and decodes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from statistics import NormalDist

import torch

from kvsmith.errors import explain
from kvsmith.kernels.decode.api import decode, decode_tiles
from kvsmith.kernels.decode.tiles import order_tensors, tile_order
from kvsmith.kernels.encode_pack.api import encode_pack
from kvsmith.kernels.format import Factors, Format, OutlierRule, Tables
from kvsmith.kernels.low_rank.api import (
    LowRankTerm,
    add_low_rank,
    fit_low_rank,
    read_factors,
)
from kvsmith.layout import channel_slots, outlier_slots, parameter_tensors
from kvsmith.pairing import Pairing
from kvsmith.spec import Identity, StaticThreshold, TensorCodec

Tensors = dict[str, torch.Tensor]


def uniform_levels(bits: int) -> torch.Tensor:
    """2^bits equally spaced levels in [-1, 1], [C] float32."""
    return torch.linspace(-1.0, 1.0, 2**bits)


def normal_levels(bits: int) -> torch.Tensor:
    """Quantiles of the normal law at (i + 1/2) / C, scaled to [-1, 1], [C] float32.

    Source: NormalFloat, QLoRA, arXiv:2305.14314. Differs: symmetric, without an exact zero.
    """
    count = 2**bits
    levels = [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    return torch.tensor([x / levels[-1] for x in levels], dtype=torch.float32)


def midpoints(lut: torch.Tensor) -> torch.Tensor:
    """Boundaries of nearest-level coding, [C - 1]."""
    return (lut[1:] + lut[:-1]) / 2


@cache
@torch.inference_mode(False)  # it outlives the call, and may meet gradients later
def hadamard(dim: int) -> torch.Tensor:
    """Sylvester's matrix over sqrt(n), orthogonal and symmetric, [D, D] float32.

    Where D is no power of 2, n is the largest one that divides it, and blocks stand along the
    diagonal.
    """
    matrix = torch.ones(1, 1)
    for _ in range((dim & -dim).bit_length() - 1):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / len(matrix) ** 0.5] * (dim // len(matrix)))


class Codec:
    """Keys or values of one layer.

    Args:
        spec: what to do.
        heads: KV heads H.
        dim: channels of a head D.
        store: dtype of online ranges and corrections.
        parameters: the tensors that `parameter_tensors` names; may be empty for codecs that own
            none.
        where: prefix of error messages, e.g. "layers.3.k".
        block: tokens that are encoded together.

    Raises:
        ValueError: a parameter is missing or has another shape.
    """

    def __init__(
        self,
        spec: TensorCodec,
        heads: int,
        dim: int,
        store: torch.dtype,
        parameters: Mapping[str, torch.Tensor],
        where: str,
        block: int = 16,
    ) -> None:
        self.spec, self.heads, self.dim, self.store = spec, heads, dim, store
        self.where = where
        self.rotation: torch.Tensor | None = None  # [H or 1, D, D]
        _check_parameters(spec, heads, dim, parameters, where)
        q = spec.quantizer
        if isinstance(q, Identity):
            return
        if spec.rotation is not None:
            self.rotation = parameters.get("rotation", hadamard(dim)[None])
        slots = outlier_slots(spec, heads, dim, block)
        outliers = _outlier_rule(spec) if slots else "none"
        each, group = channel_slots(spec, block), q.group_size or 0
        self.format = Format(q.bits, q.axis, group, slots, outliers, store, block, each)
        low_rank = spec.low_rank
        self.factors: Factors | None = None
        if low_rank is not None:
            self.factors = Factors(block, low_rank.iterations, low_rank.bits or 0, store)
        lut = parameters.get("lut")
        if lut is None:
            lut = uniform_levels(q.bits) if q.kind == "uniform" else normal_levels(q.bits)
        edges = parameters.get("edges", midpoints(lut))
        self.tables = Tables(
            lut,
            edges,
            parameters.get("scale"),
            parameters.get("zero"),
            q.kind == "uniform",
        )

    @property
    def is_identity(self) -> bool:
        """Whether tokens stay dense."""
        return isinstance(self.spec.quantizer, Identity)

    def to(self, device: torch.device) -> None:
        """Move the tables to a device."""
        if not self.is_identity and self.tables.lut.device != device:
            self.tables = self.tables.to(device)
        if self.rotation is not None:
            self.rotation = self.rotation.to(device)

    def arrange(self, pairing: Pairing) -> None:
        """Have tokens come with their channels in the order of these pairs."""
        self.to(pairing.entry.device)
        if not self.is_identity:
            t = self.tables
            scale, zero = (None if x is None else pairing.arranged(x) for x in (t.scale, t.zero))
            self.tables = replace(t, scale=scale, zero=zero)

    def tensors(self) -> list[torch.Tensor]:
        """Tables that it holds."""
        if self.is_identity:
            return []
        t, turn = self.tables, self.rotation if self.spec.rotation == "given" else None
        return [x for x in (t.lut, t.edges, t.scale, t.zero, turn) if x is not None]

    def encode(
        self, x: torch.Tensor, rank: int | None = None, out: Tensors | None = None
    ) -> Tensors:
        """Encode tokens.

        Args:
            x: [B, H, T, D] float.
            rank: of the low-rank part, None for the spec's.
            out: tensors to write to, None for new ones.

        Returns:
            Tensors named and shaped as `page_tensors` says.

        Raises:
            ValueError: x holds NaN or infinity; looked for on a CPU, and anywhere where there is a
                low-rank part.
        """
        if self.is_identity:
            return {"dense": x if out is None else out["dense"].copy_(x)}
        _check_finite(x, self.where)
        if self.rotation is not None:
            x = x.float() @ self.rotation
        if not self.factors or not self.spec.low_rank:
            return encode_pack(x, self.format, self.tables, out=out)
        error = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        tensors = encode_pack(x, self.format, self.tables, out=out, left=error)
        factors = fit_low_rank(error, self.factors, rank or self.spec.low_rank.rank)
        for name, part in factors.items():
            tensors[name] = part if out is None else out[name].copy_(part)
        return tensors

    def decode(self, tensors: Mapping[str, torch.Tensor], turned: bool = False) -> torch.Tensor:
        """Decode to [B, H, T, D]: the model's dtype for the identity, else float32; with `turned`
        the rotation stays on; without the low-rank part where its tensors are left out.
        """
        if self.is_identity:
            return tensors["dense"]
        x = decode(tensors, self.format, self.tables, self.dim)
        low = self.low_rank(tensors)
        x = x if low is None else add_low_rank(x, *low)
        return x if turned or self.rotation is None else x @ self.rotation.mT

    def low_rank(
        self, tensors: Mapping[str, torch.Tensor], tiles: bool = False
    ) -> LowRankTerm | None:
        """Factors of the low-rank part, with `tiles` for channels in tile order; None without
        one.
        """
        if "left" not in tensors:
            return None
        assert self.factors is not None
        left, right = read_factors(tensors, self.factors, self.dim)
        if tiles and (order := self.tile_order) is not None:
            flat = right.reshape(-1, self.dim).index_select(1, order)
            right = flat.view(right.shape)
        return left, right

    @property
    def tile_order(self) -> torch.Tensor | None:
        """Channel at each place of what `decode_tiles` returns; None where it cannot decode."""
        if self.is_identity or tile_order(self.format.bits, self.dim) is None:
            return None
        return order_tensors(self.format.bits, self.dim, self.tables.lut.device)[0]

    def decode_tiles(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Decode to [B, H, T, D] float32 with the channels in tile order and the rotation on,
        faster.
        """
        x = decode_tiles(tensors, self.format, self.tables, self.dim)
        low = self.low_rank(tensors, tiles=True)
        return x if low is None else add_low_rank(x, *low)


def _check_finite(x: torch.Tensor, where: str) -> None:
    """Elsewhere than on a CPU the answer would have to be waited for."""
    if x.device.type != "cpu" or math.isfinite(x.sum(dtype=torch.float32)):
        return
    # The sum alone may be too large.
    if not bool(x.isfinite().all()):
        raise ValueError(explain(where, "keys and values", "finite", "NaN or infinity"))


def _outlier_rule(spec: TensorCodec) -> OutlierRule:
    if not isinstance(spec.outliers, StaticThreshold):
        return "extremes"
    return "threshold" if spec.outliers.select == "beyond_range" else "error"


def _check_parameters(
    spec: TensorCodec, heads: int, dim: int, parameters: Mapping[str, torch.Tensor], where: str
) -> None:
    for name, info in parameter_tensors(spec, heads, dim).items():
        if name not in parameters:
            raise ValueError(
                explain(
                    f"{where}.{name}",
                    "parameter",
                    "present",
                    "nothing",
                    "Calibrate and export a bundle for it.",
                )
            )
        if tuple(parameters[name].shape) != info.shape:
            raise ValueError(
                explain(
                    f"{where}.{name}", "shape", str(info.shape), str(tuple(parameters[name].shape))
                )
            )
