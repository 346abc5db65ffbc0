"""From `model=tiny`, `model.path=DIR` or a hub name to a model and its tokenizer.

Remote code is off and weights are read from safetensors only. A local folder is looked through
first, so that a missing or truncated file is named in one line. `dtype=auto` computes in float32 on
a CPU (exact, and faster there when decoding) and in bfloat16 on a GPU, whatever the file stores;
the shipped tiny model is stored in bfloat16.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from kvsmith.errors import explain
from kvsmith.pipeline.config import input_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is loaded.

    Args:
        path: folder (absolute, relative to the current folder or to the repository root) or hub
            name `owner/name`.
        name: word for tables and bundle folders; None is the last part of `path`.
        dtype: what to compute in; `auto` is float32 on a CPU and bfloat16 on a GPU.
        device: `auto` is CUDA where there is one.
        revision: branch, tag or commit of a hub model.
        attn_implementation: as transformers' `from_pretrained`; None is its default.
    """

    path: str
    name: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    revision: str | None = None
    attn_implementation: str | None = None

    @property
    def label(self) -> str:
        """`name`, or the last part of `path`."""
        return self.name or Path(self.path).name


def load_model(cfg: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        cfg: see `ModelConfig`.

    Returns:
        The model in evaluation mode on `model_device(cfg)`, and the tokenizer.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ValueError: a damaged file, a GPU that is not there, or something that transformers refuses.
    """
    no_bars()
    device = model_device(cfg)
    source = _source(cfg)
    dtype = _dtype(cfg, device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            revision=cfg.revision or "main",
            dtype=dtype,
            attn_implementation=cfg.attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, SafetensorError, KeyError) as error:
        raise ValueError(
            explain("model.path", "model", "loadable", f"{cfg.path!r}: {_first(error)}")
        ) from error
    tokenizer = _tokenizer(cfg, source)
    return model.to(device).eval(), tokenizer


def no_bars() -> None:
    """Switch off transformers' own progress bars: what a run tells goes through `log.py`."""
    transformers_logging.disable_progress_bar()


def load_tokenizer(cfg: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer alone; raises as `load_model`."""
    return _tokenizer(cfg, _source(cfg, weights=False))


def load_config(cfg: ModelConfig) -> PreTrainedConfig:
    """Load the configuration alone; raises as `load_model`."""
    source = _source(cfg, weights=False)
    try:
        return AutoConfig.from_pretrained(
            source, revision=cfg.revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        message = f"{cfg.path!r}: {_first(error)}"
        raise ValueError(explain("model.path", "configuration", "loadable", message)) from error


def model_device(cfg: ModelConfig) -> torch.device:
    """The device that `cfg` asks for.

    Raises:
        ValueError: `cuda` is asked for and there is none.
    """
    found = torch.cuda.is_available()
    if cfg.device == "cuda" and not found:
        raise ValueError(
            explain(
                "model.device",
                "value",
                "a device of this machine",
                "'cuda'",
                "Use model.device=cpu.",
            )
        )
    return torch.device("cuda" if cfg.device != "cpu" and found else "cpu")


def _dtype(cfg: ModelConfig, device: torch.device) -> torch.dtype:
    if cfg.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[cfg.dtype]


def _source(cfg: ModelConfig, weights: bool = True) -> str:
    """A checked local folder, or the hub name."""
    folder = input_path(cfg.path)
    if folder.is_dir():
        if weights:
            _check_weights(folder)
        return str(folder)
    owner, _, name = cfg.path.partition("/")
    if not name or "/" in name or not owner.strip("."):
        remedy = "Give a folder with config.json and model.safetensors, or a hub name owner/name."
        raise FileNotFoundError(
            explain(
                "model.path", "value", "an existing folder or a hub name", repr(cfg.path), remedy
            )
        )
    return cfg.path


def _check_weights(folder: Path) -> None:
    """Refuse a folder whose safetensors are missing or cut short, by the name of the file."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(explain(str(folder), "config.json", "present", "nothing"))
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        try:
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                explain(str(index), "file", "an index of shards", _first(error))
            ) from error
    for name in sorted(names):
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(explain(str(path), "weights", "present", "nothing"))
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            remedy = "Copy or download the file again."
            raise ValueError(
                explain(str(path), "file", "whole safetensors", f"({_first(error)})", remedy)
            ) from error


def _tokenizer(cfg: ModelConfig, source: str) -> PreTrainedTokenizerBase:
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(explain(source, "tokenizer", "present (tokenizer.json)", "nothing"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=cfg.revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            explain("model.path", "tokenizer", "loadable", f"{cfg.path!r}: {_first(error)}")
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _first(error: Exception) -> str:
    """The first line of another library's message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
