"""column_scores against the attention matrix itself."""

import pytest
import torch

from kvsmith.kernels.attend.api import attend
from kvsmith.kernels.column_scores import reference
from kvsmith.kernels.column_scores.api import column_scores


def matrix(q, k, scale, mask=None, softcap=None):
    """Column sums of the softmax matrix in float64, [B, H, C]."""
    groups = q.shape[1] // k.shape[1]
    logits = q.double() @ k.double().repeat_interleave(groups, 1).transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    weights = logits.softmax(-1).nan_to_num(0.0)
    return weights.sum(2).view(q.shape[0], k.shape[1], groups, -1).sum(2)


@pytest.mark.parametrize("C", [1, 63, 100, 257])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_sums_of_the_attention_matrix(C, heads, softcap, monkeypatch):
    monkeypatch.setattr(reference, "LOGIT_ELEMENTS", 2 * 4 * 257 * 7)  # several steps
    q, k = torch.randn(2, heads[0], 33, 16), torch.randn(2, heads[1], C, 16)
    mask = torch.rand(2, 1, 33, C) < 0.7
    mask[:, :, 5] = False  # a query that sees nothing
    options = {"scale": 0.3, "mask": mask, "softcap": softcap}
    lse = attend(q, k, torch.zeros_like(k), **options).lse
    got = column_scores(q, k, lse, **options)
    # Float32 exponentials of logits below 8 err by about 1e-6 of each of at most 132 weights.
    torch.testing.assert_close(got.double(), matrix(q, k, **options), rtol=2e-5, atol=2e-5)
    assert got.dtype == torch.float32


def test_every_query_gives_one_unit_and_parts_share_its_denominator():
    q, k = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 20, 8)
    lse = attend(q, k, k, scale=1.0).lse
    whole = column_scores(q, k, lse, scale=1.0)
    torch.testing.assert_close(whole.sum(-1), torch.full((1, 2), 18.0))
    parts = [column_scores(q, part, lse, scale=1.0) for part in k.split(7, dim=2)]
    torch.testing.assert_close(torch.cat(parts, -1), whole)


def test_a_mask_shared_by_all_queries():
    q, k = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 6, 8)
    mask = torch.rand(2, 1, 1, 6) < 0.5
    mask[..., 0] = True
    lse = attend(q, k, k, scale=1.0, mask=mask).lse
    got = column_scores(q, k, lse, scale=1.0, mask=mask)
    torch.testing.assert_close(got.double(), matrix(q, k, 1.0, mask), rtol=2e-5, atol=2e-5)


def test_shapes_are_checked():
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"column_scores: shapes must be .* lse \(1, 4, 2\)"):
        column_scores(q, k, torch.zeros(1, 4, 2), scale=1.0)
    with pytest.raises(ValueError, match="column_scores: shapes"):
        column_scores(q, k[..., :4], torch.zeros(1, 4, 3), scale=1.0)
