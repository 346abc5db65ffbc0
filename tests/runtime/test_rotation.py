"""Rotated codecs: the rotation is orthogonal, folds into queries and outputs, and pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvsmith.bundle import Bundle, BundleError, base_model, load
from kvsmith.codec import Codec, hadamard
from kvsmith.eviction.policy import Lambda
from kvsmith.hf import geometry, make_cache
from kvsmith.layout import DTYPES
from kvsmith.sizes import cache_bytes
from kvsmith.spec import (
    NUQ,
    CacheSpec,
    CodecSpec,
    Identity,
    StaticThreshold,
    TensorCodec,
    TopK,
    Uniform,
)
from kvsmith.store import LayerStore
from tests.runtime.models import run

SIDES = {
    "plain": TensorCodec(Uniform(bits=4), rotation="hadamard"),
    "outliers": TensorCodec(NUQ(bits=3, table="nf"), TopK(0.05), rotation="hadamard"),
    "groups": TensorCodec(Uniform(bits=2, group_size=8), rotation="hadamard"),
    "channels": TensorCodec(Uniform(bits=4, axis="channel", group_size=16), rotation="hadamard"),
    "given": TensorCodec(Uniform(bits=4), rotation="given"),
}


def spec_of(side: TensorCodec) -> CacheSpec:
    return CacheSpec(CodecSpec(side, side, key_domain="post"), page_size=32)


def rotations(shape: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random orthogonal matrix for every head."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.{i}.{name}.rotation": torch.linalg.qr(
            torch.randn((g.kv_heads, g.k_dim, g.k_dim), generator=generator)
        )[0].contiguous()
        for i, g in enumerate(shape.layers)
        for name in "kv"
    }


@pytest.mark.parametrize("dim", [1, 2, 64, 80, 96, 128])
def test_hadamard_is_orthogonal_and_mixes(dim: int) -> None:
    matrix = hadamard(dim)
    assert torch.allclose(matrix @ matrix.T, torch.eye(dim), atol=1e-6)
    assert torch.equal(matrix, matrix.T)
    size = dim & -dim
    assert int((matrix != 0).sum()) == dim * size


@pytest.mark.parametrize("name", SIDES)
def test_the_rotation_folds_into_queries_and_outputs(
    name: str, micro_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, spec = micro_llama(layers=1), spec_of(SIDES[name])  # later layers would round otherwise
    shape = geometry(model.config)
    ids = torch.randint(3, 97, (2, 150))
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    cache = make_cache(model, spec, rotations(shape))
    folded = run(model, ids, cache, (100, 1, 49), mask)
    assert cache.bytes() == cache_bytes(spec, shape, 2, 150, torch.float32, 0)
    assert cache.stores[0].codecs[0].rotation is not None
    plain = LayerStore.segments
    monkeypatch.setattr(
        LayerStore, "segments", lambda self, stop, chunk, *_: plain(self, stop, chunk)
    )
    undone = run(model, ids, make_cache(model, spec, rotations(shape)), (100, 1, 49), mask)
    assert (folded - undone)[:, 17:].abs().max() < 1e-4 * undone[:, 17:].abs().max()


def test_the_matrices_of_heads_are_their_own(micro_llama: Callable[..., Any]) -> None:
    """At eight bits any rotation is close to none; a head that met another's would show."""
    model = micro_llama()
    ids = torch.randint(3, 97, (1, 120))
    exact = TensorCodec(Identity())
    side = TensorCodec(Uniform(bits=8), rotation="given")
    want, got = (
        run(
            model,
            ids,
            make_cache(model, spec_of(s), rotations(geometry(model.config))),
            (80, 40),
            None,
        )
        for s in (exact, side)
    )
    assert (got - want).abs().mean() < 0.02 * want.std()


def test_a_loud_channel_no_longer_drowns_the_others() -> None:
    x = torch.randn(1, 2, 64, 64)
    x[..., 5] *= 30
    errors = []
    for rotation in (None, "hadamard"):
        side = TensorCodec(Uniform(bits=4), rotation=rotation)
        codec = Codec(side, 2, 64, DTYPES["float16"], {}, "k")
        errors.append(float((codec.decode(codec.encode(x)) - x).square().mean()))
    assert errors[1] < errors[0] / 3


def test_bundles_hold_given_rotations(micro_llama: Callable[..., Any], tmp_path: Any) -> None:
    model = micro_llama()
    shape = geometry(model.config)
    base, spec = base_model(model.config.to_dict(), shape, "micro"), spec_of(SIDES["given"])
    made = rotations(shape)
    found = load(Bundle.create(spec, made, base).save_pretrained(tmp_path / "b"))
    assert found.spec == spec and "given rotation of each head" in found.card
    run(model, torch.randint(3, 97, (1, 60)), found.cache(model), (60,), None)
    made["layers.1.v.rotation"] = made["layers.1.v.rotation"] * 1.01
    with pytest.raises(BundleError, match=r"layers\.1\.v: rotation must be orthogonal to 0\.001"):
        Bundle.create(spec, made, base)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: CodecSpec(SIDES["plain"], SIDES["plain"]),
            r"codec\.k\.rotation: key_domain must be post, got 'pre'\. RoPE does not commute",
        ),
        (
            lambda: TensorCodec(
                NUQ(axis="channel", range="calibrated"), StaticThreshold(), rotation="hadamard"
            ),
            "rotation: quantizer must be one of online ranges, got nuq",
        ),
        (
            lambda: TensorCodec(Identity(), rotation="given"),
            "rotation: quantizer must be one of online ranges, got identity",
        ),
        (
            lambda: CacheSpec(
                CodecSpec(SIDES["given"], SIDES["plain"], key_domain="post"), Lambda(budget=128)
            ),
            r"codec\.rotation: value must be hadamard where tokens are evicted, got given",
        ),
    ],
)
def test_what_cannot_be_is_one_line(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def test_values_alone_may_be_rotated_and_evicted(micro_llama: Callable[..., Any]) -> None:
    codec = CodecSpec(TensorCodec(Uniform(bits=8)), SIDES["plain"])
    spec = CacheSpec(codec, Lambda(budget=96))
    model = micro_llama()
    ids = torch.randint(3, 97, (1, 200))
    assert run(model, ids, make_cache(model, spec), (120, 1, 79), None).isfinite().all()
