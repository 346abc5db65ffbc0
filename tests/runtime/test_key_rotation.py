"""Keys in tile order turn as the model's own rotary function turns them."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.glm.modeling_glm import GlmAttention, GlmConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from kvsmith.kernels.decode.tiles import order_tensors
from kvsmith.key_rotation import KeyRotation, turns_halves
from kvsmith.rope import Positions, RotarySource, rotation_function

D = 32
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def _config(scaling=None):
    rope = {"rope_theta": 10000.0, **(scaling or {"rope_type": "default"})}
    return LlamaConfig(
        hidden_size=4 * D, num_attention_heads=4, num_hidden_layers=1, rope_parameters=rope
    )


def _rotation(ids, scaling=None):
    config = _config(scaling)
    positions = Positions(16)
    positions.append(ids)
    turn = rotation_function(LlamaAttention(config, 0))
    assert turns_halves(turn, D)
    return KeyRotation(
        positions, RotarySource(LlamaRotaryEmbedding(config)), torch.float32, turn, True
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("scaling", [None, YARN])
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
def test_tiles_equal_the_models_own(bits, scaling, ids):
    rotation = _rotation(ids, scaling)
    order, place = order_tensors(bits, D, torch.device("cpu"))
    k = torch.randn(2, 3, 24, D)
    want = rotation(k, 8, None)
    got = rotation.tiles(k[..., order].contiguous(), 8, order)[..., place]
    # An angle of p radians is rounded to p * 2^-24 in the model.
    tolerance = 8 * ids.max().item() * 2**-24 * k.abs().max().item()
    torch.testing.assert_close(got, want, rtol=0, atol=max(tolerance, 1e-5))


def test_what_layers_share_is_dropped_after_a_pass():
    rotation = _rotation(torch.arange(64)[None])
    order, _ = order_tensors(4, D, torch.device("cpu"))
    rotation.tiles(torch.randn(1, 1, 16, D), 0, order)
    assert rotation.positions._shared
    rotation.positions.end_pass()
    assert not rotation.positions._shared


def test_interleaved_pairs_are_told_apart():
    config = GlmConfig(hidden_size=4 * D, num_attention_heads=4, head_dim=D, num_key_value_heads=4)
    turn = rotation_function(GlmAttention(config, 0))
    assert turn is not None and not turns_halves(turn, D)
