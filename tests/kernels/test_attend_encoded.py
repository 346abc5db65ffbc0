"""attend_encoded's kernel in Triton's interpreter, against its definition and what it must read."""

import pytest
import torch

from kvsmith.kernels.attend_encoded import launch
from kvsmith.kernels.attend_encoded.api import attend_encoded, unsupported
from kvsmith.kernels.attend_encoded.reference import decode_body
from kvsmith.kernels.decode import triton
from kvsmith.kernels.partial import Partial
from tests.kernels.counting import counted_bytes
from tests.kernels.encoded_layers import Layer, logits, make_layer


def _attend(layer: Layer, q: torch.Tensor, impl: str, **given: object) -> Partial:
    return attend_encoded(
        q,
        layer.body,
        layer.sinks,
        layer.recent,
        layer.query,
        logits(q.shape[-1], **given),
        rope=layer.rope,
        first=layer.first,
        impl=impl,  # type: ignore[arg-type]
    )


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel does not write holds NaN."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        made = empty(*args, **kwargs)  # type: ignore[call-overload]
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(launch.torch, "empty", poisoned)


CASES = [
    ("nuq", 4, 100, 2, {}),
    ("nuq", 2, 257, 1, {"offset": 100_000}),
    ("nuq", 3, 257, 2, {"padding": [0, 30]}),
    ("nuq", 4, 257, 8, {"heads": 1, "dim": 128}),
    ("nuq", 3, 100, 4, {"heads": 1, "dim": 128}),
    ("nuq", 2, 100, 4, {"heads": 1, "dim": 128}),
    ("nuq", 4, 63, 4, {"dim": 80, "v_dim": 64}),
    ("nuq", 3, 100, 2, {"dim": 96}),
    ("nuq", 2, 100, 2, {"dim": 256, "heads": 1}),
    ("nuq", 4, 1, 2, {}),
    ("nuq", 4, 300, 2, {"queries": 3, "block": 32}),
    ("nuq_plain", 4, 257, 4, {"rope": False}),
    ("nuq_plain", 8, 100, 1, {}),
    ("uniform", 1, 100, 2, {}),
    ("uniform", 5, 100, 2, {"rope": False}),
    ("uniform", 6, 63, 2, {"dim": 80}),
    ("uniform", 7, 100, 2, {}),
    ("grouped", 4, 257, 2, {"block": 32}),
    ("grouped", 2, 257, 1, {"block": 32, "dim": 128, "heads": 1}),
    ("grouped", 3, 63, 1, {"block": 32, "dim": 128, "heads": 1}),
    ("channels", 8, 257, 2, {"padding": [5, 0]}),
    ("uniform", 4, 257, 2, {"rope": False, "turned": (True, True), "padding": [0, 30]}),
    ("nuq", 4, 100, 2, {"turned": (False, True)}),
    ("gear", 2, 257, 2, {"block": 32, "rope": False, "padding": [0, 30]}),
    ("gear", 4, 200, 4, {"block": 32, "rope": False, "dim": 80, "page": 128}),
    ("gear_few", 4, 150, 2, {"block": 16, "rope": False, "turned": (True, True)}),
    ("gear_few", 8, 257, 1, {"block": 128, "rope": False, "dim": 128, "heads": 1, "page": 128}),
]


def _case(codec, bits, length, group, given, dtype=torch.float32):
    torch.manual_seed(length + bits)
    layer = make_layer(codec, bits, length, dtype=dtype, **given)
    heads, dim = given.get("heads", 2) * group, given.get("dim", 64)
    return layer, torch.randn(2, heads, given.get("queries", 1), dim).to(dtype)


@pytest.mark.parametrize(("codec", "bits", "length", "group", "given"), CASES)
def test_equals_the_definition(codec, bits, length, group, given):
    layer, q = _case(codec, bits, length, group, given)
    got, want = _attend(layer, q, "triton"), _attend(layer, q, "reference")
    # Sums of float32 products in another order, and angles that are advanced tile by tile.
    torch.testing.assert_close(got.out, want.out, rtol=0, atol=4e-6 * want.out.abs().max().item())
    torch.testing.assert_close(got.lse, want.lse, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize(
    "given",
    [
        {"window": 50},
        {"softcap": 20.0},
        {"slopes": torch.tensor([0.5, 0.1, 0.03, 0.0])},
        {"window": 100, "softcap": 5.0},
    ],
)
def test_what_shapes_logits(given):
    layer, q = _case("nuq", 4, 257, 2, {"padding": [0, 40], "queries": 2})
    got, want = _attend(layer, q, "triton", **given), _attend(layer, q, "reference", **given)
    torch.testing.assert_close(got.out, want.out, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.lse, want.lse, rtol=2e-6, atol=2e-5)


def test_pages_that_a_window_freed_are_not_read():
    layer, q = _case("nuq", 4, 300, 2, {"freed": 2})
    got = _attend(layer, q, "triton", window=100)
    want = _attend(layer, q, "reference", window=100)
    torch.testing.assert_close(got.out, want.out, rtol=0, atol=1e-5)


def _low_precision(layer: Layer, q: torch.Tensor) -> torch.Tensor:
    """Attention in the dtype of q as a plain implementation does it: k, v and weights rounded."""
    k, v = decode_body(layer.body, q)
    count = layer.recent.count
    k = torch.cat([layer.sinks.k, k.to(q.dtype), layer.recent.k[:, :, :count]], 2)
    v = torch.cat([layer.sinks.v, v.to(q.dtype), layer.recent.v[:, :, :count]], 2)
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1).float() for x in (k, v))
    weight = torch.softmax(q.float() @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
    return weight.to(q.dtype).float() @ values


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("codec", "bits"), [("nuq", 4), ("nuq", 2), ("grouped", 4)])
def test_error_in_low_precision(codec, bits, dtype):
    """At most twice that of a plain implementation and a rounding, both against float64."""
    layer, q = _case(codec, bits, 257, 4, {"rope": False, "block": 32}, dtype)
    truth = _attend(layer, q.double(), "reference").out
    plain = (_low_precision(layer, q) - truth).abs().max()
    error = (_attend(layer, q, "triton").out - truth).abs().max()
    band = torch.finfo(dtype).eps * truth.abs().max()
    assert error <= 2 * (plain + band)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rotated_keys_in_low_precision(dtype):
    layer, q = _case("nuq", 4, 257, 2, {}, dtype)
    truth = _attend(layer, q.double(), "reference").out
    error = (_attend(layer, q, "triton").out - truth).abs().max()
    # q and k are rounded once each after rotation; logits are of order one.
    assert error <= 8 * torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize(
    ("codec", "bits", "given"),
    [
        *((codec, bits, {}) for codec in ("nuq", "nuq_plain") for bits in (2, 4)),
        ("gear_few", 4, {"rope": False, "block": 64}),
    ],
)
def test_bytes_named_are_those_stored(codec, bits, given):
    """At 512K tokens of 8 heads, from what more tokens and more programs add."""
    q, tokens = torch.randn(1, 32, 1, 128).half(), 512 * 1024

    def named(length: int, splits: int) -> int:
        shape = {"heads": 8, "dim": 128, "batch": 1, "page": 128, **given}
        layer = make_layer(codec, bits, length, dtype=torch.float16, **shape)
        with pytest.MonkeyPatch.context() as patch, counted_bytes() as count:
            patch.setattr(launch, "count_splits", lambda *_: splits)
            _attend(layer, q, "triton")
        return count.total

    base = named(20 + 64, 1)
    each = (named(20 + 192, 1) - base) / 128
    program = named(20 + 64, 2) - base
    page = make_layer(codec, bits, 148, heads=8, dim=128, batch=1, page=128, **given).body.pages[0]
    stored = sum(t.nbytes for side in page.sides for t in side.values()) / 128
    splits = launch.count_splits(tokens, 8, q.device)
    assert 1 <= (each * tokens + splits * program) / (stored * tokens) <= 1.10


def test_lookups_are_tried_before_they_are_trusted(monkeypatch):
    """The interpreter runs the other lookup; one that gives something else is found out."""
    tried = launch.shuffles_work.__wrapped__
    assert tried(torch.device("cpu"), SHUFFLES=False)

    class Silent:
        def __getitem__(self, grid):
            return lambda *args, **options: None

    monkeypatch.setattr(triton, "lookup_kernel", Silent())
    assert not tried(torch.device("cpu"), SHUFFLES=False)


def test_what_the_kernel_cannot_read_is_said():
    layer = make_layer("uniform", 4, 100)
    assert unsupported(layer.body, (2, 4, 1, 64)) is None
    assert unsupported(layer.body, (2, 4, 64, 64)) == "64 queries at once"
    with pytest.raises(ValueError, match="attend_encoded: impl must be .* got 64 queries at once"):
        _attend(layer, torch.randn(2, 4, 64, 64), "triton")
    with pytest.raises(ValueError, match="attend_encoded: shapes"):
        _attend(layer, torch.randn(2, 3, 1, 64), "reference")


def test_a_graph_may_replace_the_numbers():
    """The kernel reads them from memory, so that a captured launch can go on."""
    layer, q = _case("nuq", 4, 257, 2, {})
    want = _attend(layer, q, "reference")
    numbers = [layer.body.stop, 0, layer.query, layer.recent.start, layer.recent.count]
    got = attend_encoded(
        q,
        layer.body,
        layer.sinks,
        layer.recent,
        0,
        logits(64),
        rope=layer.rope,
        counts=torch.tensor(numbers),
        impl="triton",
    )
    torch.testing.assert_close(got.out, want.out, rtol=0, atol=1e-5)
