"""The kernel of column_scores in the interpreter against the attention matrix in float64."""

import pytest
import torch

from kvsmith.kernels.attend.api import attend
from kvsmith.kernels.column_scores.api import column_scores
from tests.kernels.counting import counted_bytes
from tests.kernels.test_column_scores import matrix

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.mark.parametrize("C", [1, 63, 100, 257])
@pytest.mark.parametrize(("dim", "softcap"), [(16, None), (80, 5.0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_of_the_attention_matrix(C, dim, softcap, dtype):
    q = torch.randn(2, 33, 4, dim).to(dtype).transpose(1, 2)
    k = torch.randn(2, 2, C, dim).to(dtype)
    mask = torch.rand(2, 1, 33, C) < 0.7
    mask[:, :, 5] = False  # a query that sees nothing
    options = {"scale": 0.2, "mask": mask, "softcap": softcap}
    lse = attend(q, k, torch.zeros_like(k), **options).lse
    got = column_scores(q, k, lse, **options, impl="triton")
    # Products of half-precision inputs are exact in float32; exponentials of logits below 16 err by
    # 2e-6 of each of at most 66 weights.
    torch.testing.assert_close(got.double(), matrix(q, k, **options), rtol=2e-5, atol=2e-5)


def test_a_mask_shared_by_queries_and_none():
    q, k = torch.randn(1, 8, 1, 96), torch.randn(1, 2, 70, 96)
    for mask in (None, torch.rand(1, 1, 1, 70) < 0.5):
        lse = attend(q, k, k, scale=0.1, mask=mask).lse
        got = column_scores(q, k, lse, scale=0.1, mask=mask, impl="triton")
        want = matrix(q, k, 0.1, mask)
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


def test_bytes_moved():
    """Keys once, queries once a tile of columns: at one query, little beside the keys."""
    q, k = torch.randn(1, 8, 1, 128).half(), torch.randn(1, 2, 512, 128).half()
    lse = attend(q, k, k, scale=0.1).lse
    with counted_bytes() as count:
        out = column_scores(q, k, lse, scale=0.1, impl="triton")
    least = q.nbytes + k.nbytes + lse.nbytes + out.nbytes
    assert least <= count.total <= 1.10 * least, count.total / least
