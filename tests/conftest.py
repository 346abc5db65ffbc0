"""What every test gets: one thread, fixed seeds, no network, and the shared fixtures."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before the first import of a Hugging Face library, which reads these once.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="offline",
    MPLBACKEND="Agg",
)

import hypothesis
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# No deadline: shared machines stall. Derandomised: a red run is red again.
hypothesis.settings.register_profile("kvsmith", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("kvsmith")
torch.set_num_threads(1)
# Before the first import of triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--models-page", action="store_true", help="write docs/MODELS.md from the measured rows"
    )
    parser.addoption("--kills", type=int, default=20, help="runs that tests/faults kills")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model_dir() -> Path:
    """The shipped model; its absence is a failure, because a skip would hide it."""
    path = ROOT / "artifacts" / "models" / "tiny"
    if not (path / "config.json").is_file():
        pytest.fail(f"{path} must be present. Run python train.py experiment=pretrain_tiny.")
    return path


@pytest.fixture(scope="session")
def micro_llama() -> Callable[..., Any]:
    """Factory of Llama models with random weights: float32, eval mode, equal for equal seeds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(
        kv_heads: int = 2,
        heads: int = 4,
        head_dim: int = 16,
        layers: int = 2,
        vocab: int = 97,
        seed: int = 0,
        **config: Any,
    ) -> Any:
        settings: dict[str, Any] = {
            "vocab_size": vocab,
            "hidden_size": heads * head_dim,
            "intermediate_size": 2 * heads * head_dim,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": 512,
            # Wide enough that logits differ by more than rounding and greedy choices are stable.
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**(settings | config))).eval()

    return make


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    """NaN in every float, 0x7f in every other byte: memory that nobody wrote shows."""
    if tensor.dtype.is_complex or (tensor.is_floating_point() and tensor.element_size() > 1):
        return tensor.fill_(float("nan"))
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    tensor.untyped_storage().fill_(0x7F)  # in 8-bit floats this is NaN too
    return tensor


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poison what torch.empty and its relatives return to code in kvsmith's own modules."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            caller = str(sys._getframe(1).f_globals.get("__name__"))
            return _poison(tensor) if caller.split(".")[0] == "kvsmith" else tensor

        return call

    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
