"""Law 1: attention over any partition of the tokens merges."""

import torch

from kvsmith.kernels.attend.api import attend
from kvsmith.kernels.partial import Partial


def _inputs(dtype=torch.float64):
    q = torch.randn(2, 4, 5, 8, dtype=dtype)
    k, v = torch.randn(2, 2, 33, 8, dtype=dtype), torch.randn(2, 2, 33, 6, dtype=dtype)
    return q, k, v


def test_any_partition_merges_to_the_whole():
    q, k, v = _inputs()
    whole = attend(q, k, v, scale=0.3)
    owner = torch.randint(0, 4, (33,))
    merged = None
    for part in range(4):
        sel = owner == part
        piece = attend(q, k[:, :, sel], v[:, :, sel], scale=0.3)
        merged = piece if merged is None else merged.merge(piece)
    # float64: a few roundings of 1e-16 on numbers of size 1.
    torch.testing.assert_close(merged.out, whole.out, rtol=0, atol=5e-15)
    torch.testing.assert_close(merged.lse, whole.lse, rtol=0, atol=5e-15)


def test_empty_sets_are_neutral_and_never_nan():
    q, k, v = _inputs()
    part = attend(q, k, v, scale=0.3)
    nothing = attend(q, k, v, scale=0.3, mask=torch.zeros(1, 1, 1, 33, dtype=torch.bool))
    assert nothing.lse.isneginf().all() and (nothing.out == 0).all()
    for merged in (part.merge(nothing), nothing.merge(part)):
        torch.testing.assert_close(merged.out, part.out, rtol=0, atol=1e-15)
    both = nothing.merge(nothing)
    assert (both.out == 0).all() and both.lse.isneginf().all()


def test_merge_survives_far_apart_denominators():
    big = Partial(torch.ones(1, 1, 1, 2), torch.full((1, 1, 1), 300.0))
    small = Partial(torch.full((1, 1, 1, 2), 7.0), torch.full((1, 1, 1), -300.0))
    assert (big.merge(small).out == 1).all()
