"""A checkpoint with scales for a cache in 8-bit floats, as the compressed-tensors format has them.

Engines that read the format (vLLM among them) store keys after RoPE and values in float8_e4m3 with
one scale for each tensor of a layer. Weights stay as they are. docs/INTEROP.md is the user's page.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kvsmith.errors import explain
from kvsmith.geometry import ModelGeometry
from kvsmith.pipeline.config import input_path
from kvsmith.pipeline.model import ModelConfig
from kvsmith.pipeline.stage import read_json, write_json, write_safetensors

E4M3_MAX = 448.0
SCALES = "model-kv-scales.safetensors"
SINGLE, WEIGHTS = "model.safetensors", "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
BESIDE = (
    *("generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template*", "*.model", "preprocessor_config.json", "LICENSE*"),
)
SOURCES = (CONFIG, INDEX, "*.safetensors", *BESIDE)
Weights = Literal["copy", "link"]


@dataclass(frozen=True)
class Checkpoint:
    """What is written.

    Attributes:
        source: folder of the model.
        target: folder to write.
        scales: name of a scale in the checkpoint -> [1] float32.
        weights: copy the weights, or link to them.
    """

    source: Path
    target: Path
    scales: dict[str, Tensor]
    weights: Weights = "copy"

    def write(self) -> None:
        """Write the folder; it is whole, absent, or as it was at every moment.

        Raises:
            ValueError: the target holds something else, or the model is quantized already.
        """
        config = read_json(self.source / CONFIG)
        if "quantization_config" in config:
            got = config["quantization_config"].get("quant_method")
            where = str(self.source / CONFIG)
            raise ValueError(explain(where, "quantization_config", "absent", repr(got)))
        with _replacing(self.target) as folder:
            shards = {n: WEIGHTS if n == SINGLE else n for n in self._shards()}
            for name, written in shards.items():
                self._place(self.source / name, folder / written)
            for path in self._beside():
                shutil.copyfile(path, folder / path.name)
            write_safetensors(folder / SCALES, self.scales)
            write_json(folder / INDEX, _index(folder, [*shards.values(), SCALES]))
            write_json(folder / CONFIG, {**config, "quantization_config": quantization_config()})

    def _shards(self) -> list[str]:
        """Files of weights; a name that leaves the folder is refused."""
        index = self.source / INDEX
        names = {SINGLE}
        if index.is_file():
            names = set(read_json(index)["weight_map"].values())
        for name in sorted(names):
            if Path(name).name != name or not name.endswith(".safetensors") or name == SCALES:
                raise ValueError(explain(str(index), "shard", "a plain file name", repr(name)))
        return sorted(names)

    def _beside(self) -> list[Path]:
        found = {path for pattern in BESIDE for path in self.source.glob(pattern)}
        return sorted(path for path in found if path.is_file())

    def _place(self, source: Path, target: Path) -> None:
        if self.weights == "link":
            target.symlink_to(source.resolve())
        else:
            shutil.copyfile(source, target)
            _sync(target)


def quantization_config() -> dict[str, Any]:
    """The part of config.json; weights and activations have no group, so they are not touched."""
    scheme = {
        "num_bits": 8,
        "type": "float",
        "strategy": "tensor",
        "dynamic": False,
        "symmetric": True,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "frozen",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": scheme,
    }


def scales_of(
    model: nn.Module, geometry: ModelGeometry, amax: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The scale of each layer's keys and values: the largest magnitude becomes the largest float8.

    Args:
        model: for the names of its attention modules.
        geometry: its layers; one that reads another's tokens has that one's scales.
        amax: `layers.{i}.k` and `layers.{i}.v` -> [H] float32.

    Returns:
        `<attention module>.k_scale` and `.v_scale` -> [1] float32.

    Raises:
        ValueError: the attention modules are not named as readers of scales expect.
    """
    names = attention_names(model)
    scales = {}
    for layer, owner in enumerate(geometry.owner):
        for part in "kv":
            top = amax[f"layers.{owner}.{part}"].amax().double()
            scale = (top / E4M3_MAX).float() if top > 0 else torch.tensor(1.0)
            scales[f"{names[layer]}.{part}_scale"] = scale.reshape(1)
    return scales


def attention_names(model: nn.Module) -> dict[int, str]:
    """Layer -> name of its attention module, for families that call it `self_attn`."""
    found = {
        int(module.layer_idx): name
        for name, module in model.named_modules()
        if hasattr(module, "layer_idx") and "Attention" in type(module).__name__
    }
    for name in found.values():
        if not name.endswith(".self_attn") or not hasattr(model.get_submodule(name), "k_proj"):
            where = f"model ({type(model).__name__})"
            expected = "named self_attn, with a k_proj, which is where engines look for scales"
            raise ValueError(explain(where, "attention modules", expected, name))
    return found


def model_folder(cfg: ModelConfig) -> Path:
    """The folder of a local model, or the hub cache's of a model of the hub.

    Raises:
        ValueError: the hub has no such files, or cannot be reached.
    """
    local = input_path(cfg.path)
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(cfg.path, revision=cfg.revision, allow_patterns=list(SOURCES))
    except (OSError, ValueError) as error:
        got = f"{cfg.path!r} ({type(error).__name__})"
        raise ValueError(explain("model.path", "files of the model", "there", got)) from error
    return Path(found)


def _index(folder: Path, shards: list[str]) -> dict[str, Any]:
    where: dict[str, str] = {}
    total = 0
    for shard in shards:
        with safe_open(folder / shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, the file is no mapping
                where[name] = shard
        total += (folder / shard).stat().st_size
    return {"metadata": {"total_size": total}, "weight_map": where}


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place in the end.

    Raises:
        ValueError: what is there is not such a checkpoint.
    """
    if target.exists() and any(target.iterdir()) and not _is_ours(target):
        remedy = "Remove it, or set checkpoints= to another folder."
        expected = "new, empty, or such a checkpoint"
        raise ValueError(explain(str(target), "folder", expected, "something else", remedy))
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (target.parent / f".{target.name}.tmp-{uuid.uuid4().hex}" for _ in range(2))
    fresh.mkdir()
    try:
        yield fresh
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    try:
        found = json.loads((folder / CONFIG).read_text("utf-8"))
        return bool(found["quantization_config"] == quantization_config())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
