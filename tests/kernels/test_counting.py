"""The byte counter counts what a kernel names, and nothing that a mask hides."""

import torch
import triton
import triton.language as tl

from tests.kernels.counting import counted_bytes


@triton.jit
def add(x, y, out, n, S: tl.constexpr):
    o = tl.program_id(0) * S + tl.arange(0, S)
    first = tl.load(x)
    total = tl.load(x + o, mask=o < n, other=0.0) + tl.load(y + o, mask=o < n, other=0) + first
    tl.store(out + o, total, mask=o < n)


def test_masked_elements_and_repeated_loads():
    x, y = torch.randn(37).half(), torch.arange(37, dtype=torch.uint8)
    out = torch.full((37,), float("nan"))
    with counted_bytes() as count:
        add[(3,)](x, y, out, 37, S=16)
    torch.testing.assert_close(out, x.float() + y + x[0].float(), rtol=1e-3, atol=1e-2)
    assert (count.loads, count.stores) == (37 * (2 + 1) + 3 * 2, 37 * 4)
    add[(3,)](x, y, out, 37, S=16)
    assert count.total == 37 * 7 + 6
