"""What calibration leaves on disk, and how later steps find and read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvsmith.bundle import BaseModel, Calibration, base_model
from kvsmith.errors import explain
from kvsmith.hf import geometry
from kvsmith.hf.weights import weights_hash as hash_of
from kvsmith.pipeline.config import input_path
from kvsmith.pipeline.fit import Sensitivity
from kvsmith.pipeline.model import ModelConfig
from kvsmith.pipeline.stage import (
    check_written,
    read_json,
    read_safetensors,
)
from kvsmith.pipeline.statistics import LayerStatistics, Plan
from kvsmith.spec import CodecSpec
from kvsmith.strict import from_dict

RECORD = "calibration.json"
FIT_VERSION = 1  # raised when the same statistics give other parameters


@dataclass(frozen=True)
class Source:
    """Everything that statistics depend on; its hash names their folder.

    Attributes:
        base_model: identity and shape of the model.
        weights_hash: SHA-256 over a sample of every weight.
        dtype: what the model computed in.
        dataset, revision: the text.
        seed: of the choice of sequences.
        samples, length: sequences and tokens of each.
        tokens_hash: SHA-256 of the token ids.
        batch_size: sequences a forward pass.
        sinks: first tokens of each sequence that were left out.
        plan: what was observed.
        shards: parts that were collected apart and then merged, if there are so many batches.
    """

    base_model: BaseModel
    weights_hash: str
    dtype: str
    dataset: str
    revision: str | None
    seed: int
    samples: int
    length: int
    tokens_hash: str
    batch_size: int
    sinks: int
    plan: Plan
    shards: int = 1


@dataclass(frozen=True)
class Record:
    """The whole of calibration.json.

    Attributes:
        format, format_version: what kind of file this is.
        created_by: program and version.
        source: what the statistics are of.
        loss: mean cross-entropy of the calibration tokens, nats.
    """

    format: Literal["kvsmith-calibration"]
    format_version: Literal[1]
    created_by: str
    source: Source
    loss: float

    def provenance(self, sensitivity: Sensitivity) -> Calibration:
        """What a bundle's manifest says of its calibration."""
        s = self.source
        return Calibration(
            s.dataset, s.revision, s.seed, s.samples, s.length, s.tokens_hash, sensitivity
        )


def describe_model(cfg: ModelConfig, model: PreTrainedModel) -> tuple[BaseModel, str]:
    """Identity of a loaded model, and a hash of its weights."""
    local = input_path(cfg.path).is_dir()
    text = model.config.get_text_config(decoder=True)
    revision = None if local else getattr(model.config, "_commit_hash", None) or cfg.revision
    name = cfg.label if local else cfg.path
    return base_model(text.to_dict(), geometry(model.config), name, revision), weights_hash(model)


def weights_hash(model: PreTrainedModel) -> str:
    """Hash of a model's weights; see `kvsmith.hf.weights`."""
    return hash_of(_weights(model))


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Weights by name, each once; one that accelerate keeps on the host or on disk is fetched."""
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, weight in sorted(model.named_parameters()):
        if weight.is_meta and name in tied:
            continue  # in memory the two are one
        if weight.is_meta:
            from accelerate.utils import align_module_device

            module = model.get_submodule(name.rpartition(".")[0])
            with align_module_device(module, torch.device("cpu")):
                yield name, model.get_parameter(name)
        else:
            yield name, weight


def read_record(folder: Path) -> Record:
    """Read calibration.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        remedy = "Run calibrate.py for this model to its end."
        raise FileNotFoundError(explain(str(path), "file", "present", "nothing", remedy))
    check_written("collect", folder, RECORD)
    return from_dict(Record, read_json(path), str(path))


def find_calibration(
    root: Path, cfg: ModelConfig, model: PreTrainedModel, codec: CodecSpec | None = None
) -> Path:
    """The newest finished calibration of exactly this model.

    Args:
        root: folder of all calibrations, `artifacts/calibration`.
        cfg: how the model was loaded.
        model: the model.
        codec: what will be fitted; a calibration that left out another number of sinks is passed
            over.

    Raises:
        FileNotFoundError: there is none; says so where there are only others.
    """
    base, weights = describe_model(cfg, model)
    records = (root / cfg.label).glob(f"*/{RECORD}")
    others = 0
    for path in sorted(records, key=lambda p: (p.stat().st_mtime_ns, p), reverse=True):
        source = read_record(path.parent).source
        same = (source.base_model.config_hash, source.weights_hash) == (base.config_hash, weights)
        if same and (codec is None or codec.sinks == source.sinks):
            return path.parent
        others += 1
    got = f"{others} of other weights, shape or sinks" if others else "none"
    sinks = f" sinks={codec.sinks}" if codec is not None and others else ""
    remedy = f"Run `python calibrate.py model={cfg.label}{sinks}`."
    where = str(root / cfg.label)
    raise FileNotFoundError(explain(where, "folder", "one with a calibration", got, remedy))


def check_model(record: Record, cfg: ModelConfig, model: PreTrainedModel, folder: Path) -> None:
    """Refuse statistics of another model.

    Raises:
        ValueError: shape, position encoding or weights differ.
    """
    base, weights = describe_model(cfg, model)
    record.source.base_model.check(base, str(folder))
    if weights != record.source.weights_hash:
        remedy = "Calibrate this model."
        expected = f"{record.source.weights_hash[:8]} as calibrated"
        raise ValueError(
            explain(str(folder), "weights of the model", expected, weights[:8], remedy)
        )


def layer_file(layer: int) -> str:
    """Name of a layer's file, without its suffix."""
    return f"layer-{layer:03d}"


def read_statistics(folder: Path, record: Record, layer: int) -> LayerStatistics:
    """Statistics of one layer.

    Raises:
        FileNotFoundError, ValueError: the file is missing, damaged or of another shape.
    """
    name = f"statistics/{layer_file(layer)}.safetensors"
    path = folder / name
    check_written("collect", folder, name)
    stats = LayerStatistics(record.source.plan, record.source.base_model.layers[layer])
    try:
        stats.load_state_dict(read_safetensors(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return stats
