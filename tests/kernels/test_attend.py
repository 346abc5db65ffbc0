"""attend against torch's own attention in float64."""

import pytest
import torch
import torch.nn.functional as F

from kvsmith.kernels.attend.api import Part, attend, attend_parts


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("tokens", [1, 63, 100])
def test_equals_sdpa(heads, kv_heads, tokens):
    q = torch.randn(2, heads, 7, 16, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, tokens, 16, dtype=torch.float64).unbind(0)
    mask = torch.rand(2, 1, 7, tokens) > 0.3
    mask[..., 0] = True
    got = attend(q, k, v, scale=0.25, mask=mask)
    want = F.scaled_dot_product_attention(q, k, v, mask, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(got.out, want, rtol=0, atol=1e-14)
    logits = 0.25 * q @ k.repeat_interleave(heads // kv_heads, 1).transpose(-1, -2)
    lse = logits.masked_fill(~mask, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(got.lse, lse, rtol=0, atol=1e-13)


def test_softcap_bounds_the_logits():
    q, k = torch.full((1, 1, 1, 4), 10.0), torch.full((1, 1, 1, 4), 10.0)
    got = attend(q, k, torch.ones(1, 1, 1, 4), scale=1.0, softcap=30.0)
    torch.testing.assert_close(got.lse.item(), 30.0 * torch.tanh(torch.tensor(400.0 / 30)).item())


def test_low_precision_inputs_accumulate_in_float32():
    q, k, v = (torch.randn(1, 2, n, 64) for n in (3, 500, 500))
    low = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), scale=0.125)
    exact = attend(q.bfloat16().double(), k.bfloat16().double(), v.bfloat16().double(), scale=0.125)
    assert low.out.dtype == low.lse.dtype == torch.float32
    # float32 sums of 500 products of size 1: about 500 * 6e-8.
    torch.testing.assert_close(low.out.double(), exact.out, rtol=0, atol=3e-5)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"attend: shapes must be .* got q \(1, 3, 1, 4\)"):
        attend(torch.zeros(1, 3, 1, 4), torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), scale=1.0)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_parts_are_one_set(softcap):
    order, sizes = torch.randperm(16), (3, 1, 20)
    q = torch.randn(2, 4, 5, 16, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, sum(sizes), 16, dtype=torch.float64).unbind(0)
    mask = torch.rand(2, 4, 5, sum(sizes)) > 0.5
    mask[0, 0, 0] = False  # sees nothing
    want = attend(q, k, v, scale=0.5, mask=mask, softcap=softcap)
    pieces = zip(*(x.split(sizes, d) for x, d in ((k, 2), (v, 2), (mask, 3))), strict=True)
    parts = [Part(q, *piece) for piece in pieces]
    parts[0] = Part(q[..., order], parts[0].k[..., order], parts[0].v, parts[0].mask)
    outs, lse, weights = attend_parts(parts, scale=0.5, softcap=softcap)
    torch.testing.assert_close(sum(outs), want.out, rtol=0, atol=1e-14)
    torch.testing.assert_close(lse, want.lse, rtol=0, atol=1e-14)
    out = weights @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, want.out, rtol=0, atol=1e-14)
