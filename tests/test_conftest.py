"""The shared fixtures do what the tests that use them rely on."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch


def _allocate(dtype: torch.dtype) -> list[torch.Tensor]:
    base = torch.zeros(3, 2, dtype=dtype)
    return [
        torch.empty(3, 2, dtype=dtype),
        torch.empty((), dtype=dtype),
        torch.empty_like(base),
        base.new_empty(4),
        torch.empty_strided((2, 3), (1, 2), dtype=dtype),
    ]


def _as_module(name: str) -> Any:
    return types.FunctionType(_allocate.__code__, {"__name__": name, "torch": torch})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_poisoned_empty_fills_floats_with_nan(poisoned_empty: None, dtype: torch.dtype) -> None:
    for tensor in _as_module("kvsmith.kernels.pack.api")(dtype):
        assert tensor.float().isnan().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_poisoned_empty_fills_integers_with_0x7f(poisoned_empty: None, dtype: torch.dtype) -> None:
    for tensor in _as_module("kvsmith.cache")(dtype):
        assert bytes(tensor.reshape(-1).view(torch.uint8).tolist()) == b"\x7f" * tensor.nbytes


def test_poisoned_empty_leaves_others_alone(
    poisoned_empty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "fill_", lambda *_: pytest.fail("poisoned foreign memory"))
    _as_module("kvsmithery")(torch.float32)


def test_micro_llama_is_reproducible(micro_llama: Any) -> None:
    ids = torch.arange(10)[None]
    torch.manual_seed(1)
    first = micro_llama()(ids).logits
    torch.manual_seed(2)
    assert torch.equal(micro_llama()(ids).logits, first)
    assert first.shape == (1, 10, 97)
    assert not torch.equal(micro_llama(seed=1)(ids).logits, first)


def test_network_is_off() -> None:
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
