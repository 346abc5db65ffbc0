"""Parameters of codecs from the statistics on disk, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from kvsmith.bundle import expected_tensors
from kvsmith.errors import explain
from kvsmith.pipeline.calibration.record import Record, layer_file, read_record, read_statistics
from kvsmith.pipeline.codecs import codec_name
from kvsmith.pipeline.fit import Sensitivity, fit_codec
from kvsmith.pipeline.fit.codec import normalised_rmse, tensor_codecs
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.stage import (
    Stage,
    locked,
    read_safetensors,
    run_stage,
    write_json,
    write_safetensors,
)
from kvsmith.pipeline.statistics import LayerStatistics
from kvsmith.spec import CacheSpec, CodecSpec

FIT_VERSION = 1  # raised when the same statistics give other parameters


def owns_parameters(codec: CodecSpec, record: Record) -> bool:
    """Whether a codec has anything to fit in this model; rotations are not fitted here."""
    return not codec.takes_rotations and bool(
        expected_tensors(CacheSpec(codec), record.source.base_model.geometry)
    )


def fit_stages(
    folder: Path,
    record: Record,
    codecs: Mapping[str, CodecSpec],
    sensitivity: Sensitivity,
    layers: Sequence[int] | None = None,
) -> Iterator[Stage]:
    """One stage a layer and codec, layer by layer, so that statistics are read once.

    Args:
        folder: a finished calibration.
        record: its calibration.json.
        codecs: name -> codec that owns parameters.
        sensitivity: weights of the codebook fit.
        layers: those that are fitted; None for all that own tokens.

    Raises:
        ValueError: a codec keeps another number of sinks than were left out of the statistics.
    """
    for name, codec in codecs.items():
        _check_sinks(name, codec, record)
    for layer in record.source.base_model.geometry.owners if layers is None else layers:
        stats = cache(lambda layer=layer: read_statistics(folder, record, layer))
        for name, whole in codecs.items():
            codec = whole.at(layer)
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


def _check_sinks(name: str, codec: CodecSpec, record: Record) -> None:
    if codec.sinks != record.source.sinks:
        remedy = f"Calibrate with sinks={codec.sinks}."
        expected = f"{record.source.sinks} as calibrated"
        raise ValueError(explain(f"codec ({name}).sinks", "value", expected, codec.sinks, remedy))


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
    if codec.takes_rotations:
        expected, name = "one of codebooks and ranges", codec_name(codec)
        remedy = f"Run `python export.py codec={name}`: its bundle holds the rotations."
        raise ValueError(explain(f"codec ({name})", "parameters", expected, "rotations", remedy))
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
