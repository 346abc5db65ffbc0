"""What calibration leaves on disk, and how later steps read it.

A folder `artifacts/calibration/<model>/<hash8>/` holds `calibration.json` (where the numbers come
from), `statistics/layer-000.safetensors`, ... and `parameters/<codec>/layer-000.safetensors`, ...
Parameters of any codec that the statistics reach can be fitted later, without a model:
`parameters_for`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from kvsmith.bundle import BaseModel, Calibration, base_model
from kvsmith.errors import explain
from kvsmith.hf import geometry
from kvsmith.layout import parameter_tensors
from kvsmith.pipeline.codecs import codec_name
from kvsmith.pipeline.config import input_path
from kvsmith.pipeline.fit import Sensitivity, fit_codec
from kvsmith.pipeline.fit.codec import normalised_rmse, tensor_codecs
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.model import ModelConfig
from kvsmith.pipeline.stage import (
    Stage,
    locked,
    read_json,
    read_safetensors,
    run_stage,
    write_json,
    write_safetensors,
)
from kvsmith.pipeline.statistics import LayerStatistics, Plan
from kvsmith.spec import CodecSpec
from kvsmith.strict import from_dict

RECORD = "calibration.json"
FIT_VERSION = 1  # raised when the same statistics give other parameters
SAMPLED = 1024  # elements of each weight that enter its hash


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
    """SHA-256 over names, shapes, dtypes and 1024 evenly spread elements of all weights."""
    state = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        some = flat[:: max(1, flat.numel() // SAMPLED)].float().cpu().contiguous()
        state.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        state.update(some.numpy().astype("<f4").tobytes())
    return state.hexdigest()


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
    remedy = f"Run `python calibrate.py model={cfg.label}`."
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
    path = folder / "statistics" / f"{layer_file(layer)}.safetensors"
    stats = LayerStatistics(record.source.plan, record.source.base_model.layers[layer])
    try:
        stats.load_state_dict(read_safetensors(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return stats


def owns_parameters(codec: CodecSpec, record: Record) -> bool:
    """Whether a codec has anything to fit in this model."""
    base = record.source.base_model
    layers = [base.layers[i] for i in base.geometry.owners]
    return any(
        parameter_tensors(codec.k, g.kv_heads, g.k_dim)
        or parameter_tensors(codec.v, g.kv_heads, g.v_dim)
        for g in layers
    )


def fit_stages(
    folder: Path, record: Record, codecs: Mapping[str, CodecSpec], sensitivity: Sensitivity
) -> Iterator[Stage]:
    """One stage a layer and codec, layer by layer, so that statistics are read once.

    Args:
        folder: a finished calibration.
        record: its calibration.json.
        codecs: name -> codec that owns parameters.
        sensitivity: weights of the codebook fit.

    Raises:
        ValueError: a codec keeps another number of sinks than were left out of the statistics.
    """
    for name, codec in codecs.items():
        if codec.sinks != record.source.sinks:
            remedy = f"Calibrate with sinks={codec.sinks}."
            expected = f"{record.source.sinks} as calibrated"
            raise ValueError(
                explain(f"codec ({name}).sinks", "value", expected, codec.sinks, remedy)
            )
    for layer in record.source.base_model.geometry.owners:
        stats = cache(lambda layer=layer: read_statistics(folder, record, layer))
        for name, codec in codecs.items():
            target = f"parameters/{name}/{layer_file(layer)}"

            def run(stats=stats, codec=codec, target=target) -> None:
                fitted = fit_codec(stats(), codec, sensitivity)
                write_safetensors(folder / f"{target}.safetensors", fitted)
                write_json(folder / f"{target}.json", _errors(stats(), codec, fitted))

            yield Stage(
                f"fit-{name}-{layer_file(layer)}",
                (folder / "statistics" / f"{layer_file(layer)}.safetensors",),
                (f"{target}.json", f"{target}.safetensors"),
                run,
                {"codec": codec, "sensitivity": sensitivity, "version": FIT_VERSION},
            )


def _errors(stats: LayerStatistics, codec: CodecSpec, fitted: dict[str, Tensor]) -> dict[str, Any]:
    """Normalised errors of keys and values; None where the statistics do not tell."""
    errors = {n: normalised_rmse(stats, n, part, fitted) for n, part in tensor_codecs(codec)}
    return {f"{n}_rmse": None if e != e else e for n, e in errors.items()}


def parameters_for(
    folder: Path, codec: CodecSpec, run: Run | None = None, sensitivity: Sensitivity = "fisher"
) -> dict[str, Tensor]:
    """All parameters of a codec, fitted now if calibration did not.

    Args:
        folder: a finished calibration, `artifacts/calibration/<model>/<hash8>`.
        codec: what is stored how.
        run: tells what is fitted; None is silent.
        sensitivity: weights of the codebook fit.

    Returns:
        `layers.{i}.{k,v}.{name}` -> float32 tensor, i over the layers that own tokens; empty for a
        codec without parameters.

    Raises:
        FileNotFoundError: the calibration is not finished.
        ValueError: the statistics do not reach the codec, or a file is damaged.
    """
    record = read_record(folder)
    if not owns_parameters(codec, record):
        return {}
    name = codec_name(codec)
    with locked(folder):
        done = [
            run_stage(s, folder) for s in fit_stages(folder, record, {name: codec}, sensitivity)
        ]
    if run is not None and any(done):
        run.say(f"fitted {name} from the statistics in {folder}")
    parameters: dict[str, Tensor] = {}
    for layer in record.source.base_model.geometry.owners:
        path = folder / "parameters" / name / f"{layer_file(layer)}.safetensors"
        parameters |= {f"layers.{layer}.{k}": t for k, t in read_safetensors(path).items()}
    return parameters
