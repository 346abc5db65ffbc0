"""The kernel against its definition, byte for byte.

Every step is a correctly rounded float32 operation in both: results are equal but for one thing
that the format leaves open: which of several equal elements is an outlier. Inputs without equal
elements must give equal bytes; with them, the outliers' magnitudes must agree.
"""

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from kvsmith.codec import midpoints, normal_levels
from kvsmith.kernels.decode.api import decode
from kvsmith.kernels.encode_pack.api import encode_pack
from kvsmith.kernels.format import Format, Tables, unsigned
from tests.kernels.counting import counted_bytes

HALF = torch.float16


def _tables(fmt, heads, dim):
    lut = normal_levels(fmt.bits)
    ranges = (torch.rand(heads, dim) + 0.5, 0.1 * torch.randn(heads, dim))
    calibrated = fmt.axis == "channel" and not fmt.group
    return Tables(lut, midpoints(lut), *(ranges if calibrated else (None, None)))


def _sample(heads, tokens, dim, dtype=torch.float32, batch=1):
    """Distinct elements in float32, rounded to `dtype`; tokens before heads in memory."""
    return (torch.randn(batch, tokens, heads, dim) ** 3).to(dtype).transpose(1, 2)


@pytest.fixture
def rounds_to_bfloat16(monkeypatch):
    """The interpreter cuts bits off where devices round to nearest, ties to even."""
    cast = InterpreterBuilder.cast_impl

    def rounding(self, src, to):
        if str(to.scalar) == "bf16" and str(src.dtype.scalar) == "fp32":
            src.data = torch.from_numpy(src.data.copy()).bfloat16().float().numpy()
        return cast(self, src, to)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding)


def _equal(got, want):
    assert set(got) == set(want)
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert torch.equal(
            got[name].contiguous().view(torch.uint8), want[name].view(torch.uint8)
        ), name


def _check(fmt, heads, tokens, dim, dtype=torch.float32, batch=1):
    x, tables = _sample(heads, tokens, dim, dtype, batch), _tables(fmt, heads, dim)
    lefts = [torch.full(x.shape, torch.nan) for _ in range(2)]
    got, want = (
        encode_pack(x, fmt, tables, left=left, impl=impl)
        for left, impl in zip(lefts, ("triton", "reference"), strict=True)
    )
    _equal(got | {"left": lefts[0]}, want | {"left": lefts[1]})
    # The decoded value is rounded once more than what is left.
    off = lefts[1] - (x.float() - decode(want, fmt, tables, dim))
    assert float(off.abs().max()) <= 2**-22 * float(x.abs().max())


pytestmark = pytest.mark.usefixtures("poisoned_empty", "rounds_to_bfloat16")


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width(bits):
    _check(Format(bits, "token", 0, 0, "none", HALF), 2, 19, 16, HALF)


@pytest.mark.parametrize("rule", ["threshold", "error"])
@pytest.mark.parametrize("bits", [2, 5])
def test_calibrated_ranges_and_their_outliers(rule, bits):
    _check(Format(bits, "channel", 0, 7, rule, HALF), 4, 32, 16)


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("store", [torch.float16, torch.bfloat16, torch.float32])
def test_extremes(slots, store):
    _check(Format(3, "token", 0, slots, "extremes", store), 3, 16, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("axis", "group", "tokens"),
    [("token", 16, 21), ("channel", 16, 32), ("channel", 12, 24), ("channel", 0, 37)],
)
def test_ranges_of_groups_and_ragged_lengths(axis, group, tokens, dtype):
    _check(
        Format(4, axis, group, 0, "none", HALF, 48), 2, tokens, 80 if axis == "token" else 24, dtype
    )


@pytest.mark.parametrize("dim", [80, 96])
def test_head_dims_that_are_no_power_of_two(dim):
    _check(Format(3, "token", 0, 9, "extremes", torch.float32), 3, 16, dim, batch=2)


def test_one_byte_indices():
    """Few enough places for a block: index and start are uint8."""
    fmt = Format(2, "token", 0, 3, "extremes", HALF)
    x = _sample(2, 16, 8)
    assert encode_pack(x, fmt, _tables(fmt, 2, 8), impl="triton")["index"].dtype == torch.uint8
    _check(fmt, 2, 16, 8)


@pytest.mark.parametrize("rule", ["extremes", "error"])
def test_equal_elements_change_only_which_of_them_is_an_outlier(rule):
    axis = "token" if rule == "extremes" else "channel"
    fmt, tables = Format(3, axis, 0, 6, rule, torch.float32), None
    tables = _tables(fmt, 2, 16)
    if tables.scale is not None:
        tables.scale.fill_(1.0), tables.zero.fill_(0.0)
    x = torch.randint(-3, 4, (1, 2, 16, 16)).float() / 2
    got = encode_pack(x, fmt, tables, impl="triton")
    want = encode_pack(x, fmt, tables, impl="reference")
    assert torch.equal(got["codes"], want["codes"])
    for result in (got, want):
        flat = unsigned(result["index"]) % 16
        assert flat.shape == (1, 1, 96)
    errors = [
        (decode(r, fmt, tables, 16) - x).abs().transpose(1, 2).flatten(2) for r in (got, want)
    ]
    assert torch.equal(errors[0].sort(-1).values, errors[1].sort(-1).values)


def test_a_constant_token_and_large_values():
    fmt = Format(4, "token", 0, 2, "extremes", HALF)
    x = torch.randn(1, 2, 16, 16)
    x[:, :, 0], x[:, :, 1] = 3.0, 0.0
    x[0, 0, 2, 3], x[0, 1, 2, 4] = 3e5, -3e5
    got = encode_pack(x, fmt, _tables(fmt, 2, 16), impl="triton")
    want = encode_pack(x, fmt, _tables(fmt, 2, 16), impl="reference")
    for name in ("codes", "scale", "zero"):
        assert torch.equal(got[name], want[name])
    torch.testing.assert_close(*(decode(r, fmt, _tables(fmt, 2, 16), 16) for r in (got, want)))


def test_it_writes_into_a_part_of_larger_tensors():
    fmt = Format(3, "token", 0, 4, "extremes", HALF)
    x, tables = _sample(2, 16, 16, batch=2), _tables(fmt, 2, 16)
    want = encode_pack(x, fmt, tables)
    whole = {
        name: torch.full(
            (2, 3, *t.shape[1:]) if t.dim() < 4 else (2, 2, 48, t.shape[3]), 7, dtype=t.dtype
        )
        for name, t in want.items()
    }
    whole["codes"] = torch.full((2, 2, 48, want["codes"].shape[3]), 7, dtype=torch.uint8)
    views = {n: t[:, :, 16:32] if n == "codes" else t[:, 1] for n, t in whole.items()}
    for impl in ("triton", "reference"):
        got = encode_pack(x, fmt, tables, out=views, impl=impl)
        _equal(got, want)
        assert all(
            (t[:, 0] == 7).all() and (t[:, 2] == 7).all() for n, t in whole.items() if n != "codes"
        )
        assert (whole["codes"][:, :, :16] == 7).all() and (whole["codes"][:, :, 32:] == 7).all()


@pytest.mark.parametrize(
    ("fmt", "limit"),
    [
        # Edges and codebook once a token, lists of outliers written and read once.
        (Format(4, "token", 0, 10, "extremes", HALF), 1.12),
        (Format(2, "token", 0, 10, "extremes", HALF), 1.10),
        (Format(4, "token", 0, 0, "none", HALF), 1.10),
        # The ranges [H, D] in float32 once a program.
        (Format(4, "channel", 0, 10, "error", HALF), 1.25),
        (Format(4, "token", 32, 0, "none", HALF), 1.10),
        (Format(4, "channel", 32, 0, "none", HALF, 32), 1.10),
    ],
)
def test_bytes_moved(fmt, limit, monkeypatch):
    """Against input and output once, at the heads of Llama-3-8B in bfloat16."""
    from kvsmith.kernels.encode_pack import triton

    monkeypatch.setattr(triton, "PROGRAMS", 1)
    tokens = 32 if fmt.axis == "channel" else 16
    x, tables = _sample(8, tokens, 128, torch.bfloat16), _tables(fmt, 8, 128)
    with counted_bytes() as count:
        result = encode_pack(x, fmt, tables, impl="triton")
    least = x.nbytes + sum(t.nbytes for t in result.values()) + tables.nbytes
    assert least <= count.total <= limit * least, count.total / least


def test_what_the_kernel_does_not_serve(monkeypatch):
    fmt = Format(4, "token", 0, 0, "none", HALF)
    x = torch.randn(1, 2, 16, 20)
    with pytest.raises(ValueError, match="layout must be one that triton serves, got head dim 20"):
        encode_pack(x, fmt, _tables(fmt, 2, 20), impl="triton")
    assert encode_pack(x, fmt, _tables(fmt, 2, 20))["codes"].shape == (1, 2, 16, 10)
    for axis in ("channel", "token"):
        fmt = Format(4, axis, 8, 4, "extremes", HALF, 16, 2)
        with pytest.raises(ValueError, match="got outliers beside ranges of groups of 8"):
            encode_pack(x[..., :16], fmt, _tables(fmt, 2, 16), impl="triton")
        # Where nobody says, the reference stands in, on a device that prefers triton too.
        want = encode_pack(x[..., :16], fmt, _tables(fmt, 2, 16), impl="reference")
        monkeypatch.setenv("KVSMITH_KERNELS", "triton")
        _equal(encode_pack(x[..., :16], fmt, _tables(fmt, 2, 16)), want)


def test_wide_tokens_get_their_outliers_in_a_launch_of_their_own(monkeypatch):
    from kvsmith.kernels.encode_pack import triton

    monkeypatch.setattr(triton, "MOST_KEPT", 32)
    for rule in ("threshold", "error"):
        _check(Format(3, "channel", 0, 7, rule, HALF), 4, 16, 16)
