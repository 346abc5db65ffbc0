"""From `model=tiny`, `model.path=DIR` or a hub name to a model and its tokenizer.

Remote code is off and weights are read from safetensors only. A local folder is looked through
first, so that a missing or truncated file is named in one line. `dtype=auto` computes in float32 on
a CPU (exact, and faster there when decoding) and in bfloat16 on a GPU, whatever the file stores;
the shipped tiny model is stored in bfloat16.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from kvsmith.bundle import Bundle
from kvsmith.errors import explain
from kvsmith.hf import share
from kvsmith.hf.shapes import positions_of
from kvsmith.pipeline.config import input_path
from kvsmith.pipeline.model_source import LOADING, PACKAGES, find_source, need_packages, refusal
from kvsmith.strict import added_later

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
YES = ("1", "true", "yes", "on", "y", "t")  # as accelerate reads its variables
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
        device_map: spread over all devices by accelerate; None loads to `device`.
        attn_implementation: None is transformers' default for the model.
        weight_bits: 8 or 4 rounds the weights as they are loaded (bitsandbytes); None takes them
            as stored, also those of GPTQ and other quantized checkpoints.
        revision: branch, tag or commit of a hub model; None is its main branch.
        trust_remote_code: run code that comes with the model.
        delta: bundle (folder or hub name) whose delta changes the model, see docs/CLA.md.
    """

    path: str
    name: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    attn_implementation: Literal["sdpa", "flash_attention_2", "eager"] | None = None
    weight_bits: Literal[8, 4] | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    delta: str | None = added_later(None)

    def __post_init__(self) -> None:
        if self.device_map is not None and self.device != "auto":
            remedy = "Set model.device_map=null to load to one device."
            expected = "auto with model.device_map"
            raise ValueError(explain("model.device", "value", expected, repr(self.device), remedy))

    @property
    def label(self) -> str:
        """`name`, or the last part of `path`."""
        return self.name or Path(self.path).name


def load_model(cfg: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        cfg: see `ModelConfig`.

    Returns:
        The model in evaluation mode, on `model_device(cfg)` or as `cfg.device_map` spreads it, and
        the tokenizer.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ValueError: a damaged file, a device or package that is not there, or something that
            transformers refuses.
    """
    quiet()
    device = model_device(cfg)
    source = find_source(cfg.path)
    options = _loading(cfg, load_config(cfg), device)
    try:
        model, info = _from_pretrained(
            AutoModelForCausalLM, cfg, source, output_loading_info=True, **options
        )
    except LOADING as error:
        raise refusal(cfg.path, "model", error, cfg.revision) from error
    if lacking := sorted(info["missing_keys"]):  # they would be random numbers
        got = f"nothing for {len(lacking)} of them, first {lacking[0]}"
        remedy = "Copy or download the files again."
        raise ValueError(explain(cfg.path, "weights", "complete", got, remedy))
    tokenizer = _tokenizer(cfg, source)
    if "device_map" not in options:
        model = model.to(device)
    if cfg.delta is not None:
        _delta(cfg.delta).apply(model)
    share(model)
    return model.eval(), tokenizer


def quiet() -> None:
    """No bars and retries of other libraries: what a run tells goes through `log.py`."""
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


def load_tokenizer(cfg: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer alone; raises as `load_model`."""
    return _tokenizer(cfg, find_source(cfg.path, weights=False))


def load_config(cfg: ModelConfig) -> PreTrainedConfig:
    """Load the configuration alone; raises as `load_model`."""
    source = find_source(cfg.path, weights=False)
    try:
        config: PreTrainedConfig = _from_pretrained(AutoConfig, cfg, source)
    except LOADING as error:
        raise refusal(cfg.path, "configuration", error, cfg.revision) from error
    if cfg.delta is not None:
        owner = _delta(cfg.delta).manifest.base_model.owner
        config.get_text_config(decoder=True).kv_owner = list(owner)
    return config


def _delta(name: str) -> Bundle:
    """A bundle that has a delta."""
    folder = input_path(name)
    bundle = Bundle.from_pretrained(folder if folder.is_dir() else name)
    if bundle.manifest.delta is None:
        expected = "a bundle with one, from export.py delta=auto"
        raise ValueError(explain("model.delta", "delta", expected, f"none in {name}"))
    return bundle


def model_device(cfg: ModelConfig) -> torch.device:
    """The device that `cfg` asks for; `auto` keeps to ACCELERATE_USE_CPU=true.

    Raises:
        ValueError: `cuda` is asked for and there is none.
    """
    found = torch.cuda.is_available()
    if cfg.device == "cuda" and not found:
        remedy = "Use model.device=cpu."
        expected = "a device of this machine"
        raise ValueError(explain("model.device", "value", expected, "'cuda'", remedy))
    cpu = cfg.device == "cpu" or (
        cfg.device == "auto" and os.environ.get("ACCELERATE_USE_CPU", "").lower() in YES
    )
    return torch.device("cuda" if found and not cpu else "cpu")


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: the device of the embedding, also where accelerate keeps its weights
    elsewhere.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if device is None else torch.device(device)


def model_context(config: PreTrainedConfig) -> int:
    """Positions that a model was made for; without bound where it knows none."""
    return positions_of(config.get_text_config(decoder=True)) or sys.maxsize


def _loading(cfg: ModelConfig, config: PreTrainedConfig, device: torch.device) -> dict[str, Any]:
    """Options of `from_pretrained` beside where the model comes from.

    Raises:
        ValueError: a package is missing, or options contradict each other.
    """
    dtype = _dtype(cfg, device)
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": cfg.attn_implementation,
        "use_safetensors": True,
    }
    if cfg.attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        remedy = "Run `pip install flash-attn`, or set model.attn_implementation=sdpa."
        expected = "installed, with a GPU, for flash_attention_2"
        where = "model.attn_implementation"
        raise ValueError(explain(where, "package flash-attn", expected, "nothing", remedy))
    stored = _quantized(config)
    if cfg.weight_bits is not None:
        if stored is not None:
            expected = f"null for weights that are {stored} already"
            raise ValueError(explain("model.weight_bits", "value", expected, cfg.weight_bits))
        need_packages(
            "model.weight_bits",
            ("bitsandbytes", "accelerate"),
            f"{cfg.weight_bits}-bit weights",
            "set model.weight_bits=null",
        )
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=cfg.weight_bits == 8,
            load_in_4bit=cfg.weight_bits == 4,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
    elif stored is not None:
        need_packages("model.path", PACKAGES.get(stored, ()), f"its {stored} weights")
    if cfg.device_map is not None:
        need_packages("model.device_map", ("accelerate",), "it", "set model.device_map=null")
        options["device_map"] = cfg.device_map
    elif cfg.weight_bits is not None or stored is not None:
        options["device_map"] = {"": device}  # quantized weights cannot be moved later
    return options


def _quantized(config: PreTrainedConfig) -> str | None:
    """How a checkpoint says that its weights are quantized."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else None
    return None if found is None else str(method)


def _from_pretrained(loader: Any, cfg: ModelConfig, source: str, **options: Any) -> Any:
    """The one way to transformers' loaders, so that remote code is decided in one place."""
    return loader.from_pretrained(
        source,
        revision=cfg.revision or "main",
        trust_remote_code=cfg.trust_remote_code,
        **options,
    )


def _dtype(cfg: ModelConfig, device: torch.device) -> torch.dtype:
    if cfg.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[cfg.dtype]


def _tokenizer(cfg: ModelConfig, source: str) -> PreTrainedTokenizerBase:
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(explain(source, "tokenizer", "present (tokenizer.json)", "nothing"))
    try:
        tokenizer = _from_pretrained(AutoTokenizer, cfg, source)
    except LOADING as error:
        raise refusal(cfg.path, "tokenizer", error, cfg.revision) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer
