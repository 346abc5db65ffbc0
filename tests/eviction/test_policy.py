"""Policies refuse what cannot be, and say where."""

import pytest

from kvsmith.eviction.policy import H2O, TOVA, KeepAll, Lambda
from kvsmith.less.spec import MLP, Less
from kvsmith.spec import CacheSpec, CodecSpec, Identity, TensorCodec
from kvsmith.strict import to_dict

CODEC = CodecSpec(TensorCodec(Identity()), TensorCodec(Identity()))


@pytest.mark.parametrize(
    "policy", [Lambda(512), H2O(512, recent=100), H2O(512, aging=0.5), TOVA(60), KeepAll()]
)
def test_round_trip_through_plain_data(policy):
    spec = CacheSpec(CODEC, policy)
    assert CacheSpec.parse(to_dict(spec)) == spec
    assert "less" not in to_dict(spec)  # as bundles without a state have always been written
    if not isinstance(policy, KeepAll):
        spec = CacheSpec(CODEC, policy, less=Less(MLP(64), ranks=(2, 4)))
        assert CacheSpec.parse(to_dict(spec)) == spec


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: H2O(8, recent=6, sinks=2),
            r"eviction\.budget: token count must be at least sinks \+ recent \+ 1 = 9, got 8",
        ),
        (lambda: H2O(40, aging=2.0), r"eviction\.aging: exponent must be in \[0, 1\], got 2\.0"),
        (lambda: Lambda(2), r"eviction\.budget: .* = 5, got 2"),
        (lambda: TOVA(-1), r"eviction\.budget: token count must be at least 0, got -1"),
        (
            lambda: CacheSpec(CODEC, TOVA(51)),
            r"eviction\.budget: .* at least sinks \+ recent \+ 2 blocks of the codec = 52, got 51",
        ),
        (
            lambda: CacheSpec(CODEC, H2O(60, recent=50)),
            r"eviction: sinks \+ recent must be at most budget - block_size = 44, got 50",
        ),
        (lambda: CacheSpec(CODEC, less=Less()), r"cache\.less: eviction must be one that evicts"),
        (lambda: Less(rank=0), r"less\.rank: features must be at least 1, got 0"),
        (lambda: Less(ranks=(2, 0)), r"less\.ranks: features must be at least 1, got 0"),
        (lambda: MLP(0), r"less\.features\.hidden: width must be positive, got 0"),
    ],
)
def test_impossible_specs(build, message):
    with pytest.raises(ValueError, match=message):
        build()
