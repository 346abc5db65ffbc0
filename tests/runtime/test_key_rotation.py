"""Keys in tile order turn as the model's own rotary function turns them."""

import pytest
import torch
from transformers import CohereConfig, GlmConfig, LlamaConfig, PhiConfig
from transformers.models.cohere.modeling_cohere import CohereAttention, CohereRotaryEmbedding
from transformers.models.glm.modeling_glm import GlmAttention, GlmRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.phi.modeling_phi import PhiAttention, PhiRotaryEmbedding

from kvsmith.kernels.decode.tiles import order_tensors
from kvsmith.key_rotation import KeyRotation
from kvsmith.pairing import find_pairing
from kvsmith.regular import regular_rope
from kvsmith.rope import Positions, RotarySource, rotation_function

D = 32
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


STYLES = {
    "llama": (LlamaConfig, LlamaAttention, LlamaRotaryEmbedding, {}),
    "cohere": (CohereConfig, CohereAttention, CohereRotaryEmbedding, {}),
    "phi": (PhiConfig, PhiAttention, PhiRotaryEmbedding, {"partial_rotary_factor": 0.5}),
    "glm": (GlmConfig, GlmAttention, GlmRotaryEmbedding, {"head_dim": D}),
}
CPU = torch.device("cpu")


def _rotation(ids, scaling=None, style="llama"):
    rope = {"rope_theta": 10000.0, **(scaling or {"rope_type": "default"})}
    make, attention, rotary, options = STYLES[style]
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1}
    rope |= {n: v for n, v in options.items() if n == "partial_rotary_factor"}
    config = make(hidden_size=4 * D, rope_parameters=rope, **heads, **options)
    positions = Positions(16)
    positions.append(ids)
    turn, source = rotation_function(attention(config, 0)), RotarySource(rotary(config))
    pairing = find_pairing(turn, D, source(ids[:1, :1], torch.float32)[0].shape[-1], CPU)
    return KeyRotation(positions, source, torch.float32, turn, pairing)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("style", "scaling"),
    [("llama", None), ("llama", YARN), *((s, None) for s in STYLES if s != "llama")],
)
@pytest.mark.parametrize(
    "ids",
    [
        torch.arange(64)[None],
        torch.arange(64)[None] + torch.tensor([[0], [700]]),
        (torch.arange(64)[None] - torch.tensor([[0], [20]])).clamp(min=1),
        torch.arange(64)[None] * 3,
    ],
    ids=["plain", "shifted", "padded", "gaps"],
)
def test_tiles_equal_the_models_own(bits, style, scaling, ids):
    rotation = _rotation(ids, scaling, style)
    order, place = order_tensors(bits, D, torch.device("cpu"))
    k = torch.randn(2, 3, 24, D)
    want = rotation(k, 8, None)
    got = rotation.tiles(k[..., order].contiguous(), 8, None, order)[..., place]
    # An angle of p radians is rounded to p * 2^-24 in the model.
    tolerance = 8 * ids.max().item() * 2**-24 * k.abs().max().item()
    torch.testing.assert_close(got, want, rtol=0, atol=max(tolerance, 1e-5))


@pytest.mark.parametrize("heads", [1, 3], ids=["shared", "by head"])
@pytest.mark.parametrize("scaling", [None, YARN])
def test_tiles_of_columns_equal_the_models_own(heads, scaling):
    ids = torch.arange(1000)[None] + torch.tensor([[0], [700]])
    rotation = _rotation(ids, scaling)
    order, place = order_tensors(4, D, CPU)
    columns = torch.randint(-1, 1000, (2, heads, 24)).expand(2, 3, 24)
    k = torch.randn(2, 3, 24, D)
    want = rotation(k.view(2, 1, -1, D), None, columns.reshape(2, -1)).view(k.shape)
    got = rotation.tiles(k[..., order].contiguous(), None, columns, order)[..., place]
    there = columns >= 0
    tolerance = 8 * 1700 * 2**-24 * k.abs().max().item()
    torch.testing.assert_close(got[there], want[there], rtol=0, atol=tolerance)
    assert got.isfinite().all()


def test_what_layers_share_is_dropped_after_a_pass():
    rotation = _rotation(torch.arange(64)[None])
    order, _ = order_tensors(4, D, torch.device("cpu"))
    rotation.tiles(torch.randn(1, 1, 16, D), 0, None, order)
    assert rotation.positions._shared
    rotation.positions.end_pass()
    assert not rotation.positions._shared


@pytest.mark.parametrize("style", STYLES)
def test_in_the_order_of_the_pairs_rope_is_half_split(style):
    rotation = _rotation(torch.arange(64)[None], style=style)
    pairing, positions, k = rotation.pairing, rotation.positions, torch.randn(1, 2, 64, D)
    cos, sin = rotation.source(torch.arange(64)[None], torch.float32)
    want = rotation.rotate(k, cos, sin)
    torch.testing.assert_close(pairing.natural(pairing.arranged(k)), k, rtol=0, atol=0)
    got = pairing.natural(rotation(pairing.arranged(k), 0, None))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    rope = regular_rope(positions, rotation.source, 64, None, k, pairing)
    angle = 2 * torch.pi * torch.arange(64)[:, None] * rope.turns
    lower, upper = pairing.arranged(k).double().chunk(2, -1)
    turned = torch.complex(lower, upper) * torch.polar(torch.ones_like(angle), angle)
    halves = pairing.natural(torch.cat([turned.real, turned.imag], -1)).float()
    torch.testing.assert_close(halves, want, rtol=0, atol=8 * 64 * 2**-24 * 4)
    assert (pairing.order is None) == (style == "llama")
    assert int((rope.turns == 0).sum()) == (D // 4 if style in ("phi", "glm") else 0)


def test_pairs_are_found_whatever_torch_is_set_to():
    turn = rotation_function(GlmAttention(GlmConfig(hidden_size=128, num_attention_heads=4), 0))
    with torch.inference_mode():
        torch.set_default_dtype(torch.bfloat16)
        try:
            found = find_pairing(turn, D, D // 2, CPU)
        finally:
            torch.set_default_dtype(torch.float32)
    x = torch.randn(3, D, requires_grad=True)
    found.arranged(x).sum().backward()  # a pass with gradients meets the same pairs
    torch.testing.assert_close(x.grad, torch.ones(3, D))


def test_other_functions_have_no_pairs():
    def same(x, cos, sin):
        return x * cos + x.roll(1, -1) * sin

    def three(x, cos, sin):
        first, second, third = x[..., :1], x[..., 1:2], x[..., 2:3]
        mixed = [first * cos[..., :1] - third * sin[..., :1], first * sin[..., :1] + second, third]
        return torch.cat([*mixed, x[..., 3:]], -1)

    assert find_pairing(same, 8, 8, CPU) is None
    assert find_pairing(three, 8, 8, CPU) is None
