"""A decode step needs the stored bytes and one chunk; the chunk does not grow with the context."""

import pytest
import torch

from kvsmith.attention import CHUNK_ELEMENTS
from kvsmith.pipeline.bench_decode import DIM, HEADS, KV_HEADS, ours
from tests.runtime.live_memory import LiveMemory


def _step_peak(tokens: int) -> int:
    k, v = torch.randn(2, 1, KV_HEADS, tokens, DIM, dtype=torch.bfloat16).unbind(0)
    step = ours(4, 0.01, k, v, torch.randn(1, HEADS, 1, DIM, dtype=torch.bfloat16))
    step()
    with LiveMemory() as memory:
        step()
    return memory.peak


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@torch.inference_mode()
def test_memory_of_a_step_is_one_chunk(kernels, monkeypatch):
    monkeypatch.setenv("KVSMITH_KERNELS", kernels)
    short, long = _step_peak(2048), _step_peak(8192)
    # Keys and values of a chunk in float32, their codes, indices and logits.
    chunk = 4 * 2 * CHUNK_ELEMENTS
    assert short <= 2 * chunk
    # What is shared by chunks: a row of angles each.
    assert long - short <= 0.05 * 6144 * KV_HEADS * 2 * DIM * 4.3 / 8
    # The dense copy that a cache of rotated keys reads.
    assert long < 8192 * KV_HEADS * 2 * DIM * 2


@torch.inference_mode()
def test_a_dense_copy_would_be_seen():
    with LiveMemory() as memory:
        x = torch.zeros(1000)
        y = x + 1
        del x
        z = (y * 2).view(10, 100)
    assert memory.peak == 12000 - 4000 and memory.live == 8000
    del y, z
    assert memory.live == 0
