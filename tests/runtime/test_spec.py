"""The spec refuses what cannot be, and says where."""

import pytest
import torch

from kvsmith.geometry import LayerGeometry, ModelGeometry
from kvsmith.layout import check_geometry, outlier_slots
from kvsmith.sizes import bits_per_element
from kvsmith.spec import (
    NUQ,
    CacheSpec,
    CodecSpec,
    Identity,
    LowRank,
    StaticThreshold,
    TensorCodec,
    TopK,
    Uniform,
)
from kvsmith.strict import to_dict


def kvquant(bits, fraction=0.01, **codec):
    return CacheSpec(
        CodecSpec(
            TensorCodec(
                NUQ(bits=bits, axis="channel", range="calibrated"), StaticThreshold(fraction)
            ),
            TensorCodec(NUQ(bits=bits), TopK(fraction)),
            **codec,
        )
    )


def test_round_trip_through_plain_data():
    spec = kvquant(3, sinks=2, recent=0)
    assert CacheSpec.parse(to_dict(spec)) == spec


@pytest.mark.parametrize(("bits", "most"), [(4, 4.36), (3, 3.36), (2, 2.36)])
def test_all_in_bits_at_kv_width_4096(bits, most):
    """All layers, scales, outliers, windows, positions and codebooks of a Llama-2-7B cache."""
    model = ModelGeometry((LayerGeometry(32, 32, 128, 128),) * 32)
    got = bits_per_element(kvquant(bits), model, 1, 131072, torch.bfloat16)
    assert bits + 0.32 < got <= most


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NUQ(bits=9), r"quantizer\(nuq\)\.bits: value must be between 1 and 8, got 9"),
        (
            lambda: TopK(0.5),
            r"outliers\.fraction: share of elements must be in \[0, 0\.5\), got 0\.5",
        ),
        (lambda: TopK(-0.1), r"got -0\.1"),
        (lambda: Uniform(axis="channel"), "group_size must be given for online channel ranges"),
        (lambda: NUQ(range="calibrated"), "range calibrated must be used with axis channel"),
        (
            lambda: TensorCodec(NUQ(), StaticThreshold()),
            "paired with a quantizer of range calibrated",
        ),
        (
            lambda: TensorCodec(NUQ(axis="channel", range="calibrated"), TopK()),
            "paired with a quantizer of online ranges",
        ),
        (
            lambda: TensorCodec(Identity(), TopK()),
            "paired with a quantizer of online ranges",
        ),
        (lambda: TensorCodec(Identity(), None, LowRank()), "low_rank: quantizer must be one that"),
        (
            lambda: LowRank(rank=0),
            r"low_rank\.rank: value must be between 1 and the head dim, got 0",
        ),
        (
            lambda: LowRank(prompt_rank=-2),
            r"low_rank\.rank: value must be between 1 and the head dim, got -2",
        ),
        (
            lambda: LowRank(iterations=0),
            r"low_rank\.iterations: value must be between 1 and 16, got 0",
        ),
        (lambda: LowRank(bits=1), r"low_rank\.bits: value must be between 2 and 8, got 1"),
        (lambda: LowRank(bits=9), r"low_rank\.bits: value must be between 2 and 8, got 9"),
        (
            lambda: CodecSpec(
                TensorCodec(Uniform()), TensorCodec(Uniform(), None, LowRank(2, prompt_rank=17))
            ),
            r"codec\.v\.low_rank: rank must be at most block_size = 16, got 17",
        ),
        (
            lambda: CodecSpec(
                TensorCodec(Uniform(axis="channel", group_size=16), TopK(0.02)),
                TensorCodec(Uniform()),
            ),
            r"k\.outliers\.fraction: share must be 0, or enough for one of the block_size = 16",
        ),
        (lambda: NUQ(table="nf", q_norm=True), "q_norm"),
        (lambda: kvquant(4, sinks=-1), r"codec\.sinks: token count must be at least 0, got -1"),
        (lambda: kvquant(4, block_size=24), "multiple of block_size = 24"),
        (
            lambda: CodecSpec(
                TensorCodec(Uniform(axis="channel", group_size=32)),
                TensorCodec(Uniform()),
                block_size=16,
            ),
            r"codec\.k\.quantizer\.group_size: tokens per group must be a divisor of block_size",
        ),
    ],
)
def test_impossible_specs(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_unknown_keys_are_named_with_a_near_miss():
    data = to_dict(kvquant(4))
    data["codec"]["k"]["quantizer"]["bit"] = 3
    with pytest.raises(
        ValueError, match=r"cache\.codec\.k\.quantizer: key must be .*'bit'.*Did you mean bits"
    ):
        CacheSpec.parse(data)


def test_where_one_percent_is_less_than_one_element():
    assert outlier_slots(kvquant(4).codec.k, 1, 32, 16) == 0
    narrow = ModelGeometry((LayerGeometry(1, 1, 32, 32),))
    assert bits_per_element(kvquant(4), narrow, 1, 1 << 16, torch.bfloat16) > 4


def test_geometry_is_checked():
    spec = CacheSpec(CodecSpec(TensorCodec(Uniform(group_size=24)), TensorCodec(Identity())))
    with pytest.raises(
        ValueError, match=r"codec\.k\.quantizer\.group_size: group must be a divisor of head dim 64"
    ):
        check_geometry(spec, ModelGeometry((LayerGeometry(1, 1, 64, 64),)))
    spec = CacheSpec(
        CodecSpec(TensorCodec(Uniform(), None, LowRank(9)), TensorCodec(Identity()), block_size=16)
    )
    with pytest.raises(ValueError, match=r"codec\.k\.low_rank: rank must be at most head dim 8 "):
        check_geometry(spec, ModelGeometry((LayerGeometry(1, 1, 8, 8),)))
    with pytest.raises(ValueError, match=r"owner\[0\]"):
        ModelGeometry((LayerGeometry(1, 1, 8, 8),) * 2, owner=(1, 1))
