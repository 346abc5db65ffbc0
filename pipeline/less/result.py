"""What training leaves: `less.json` says what it is, `less.safetensors` holds the features.

Tensors are those of the largest rank, `layers.{i}.less.{name}`; smaller ranks are their first
features (`cut`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

import kvsmith
from kvsmith.bundle import BaseModel
from kvsmith.errors import explain
from kvsmith.eviction.policy import KeepAll
from kvsmith.layout import evicting_layers, less_parameters
from kvsmith.less.spec import Less
from kvsmith.pipeline.less.options import LessTraining
from kvsmith.pipeline.stage import (
    file_hash,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)
from kvsmith.spec import CacheSpec
from kvsmith.strict import from_dict

RECORD, TENSORS = "less.json", "less.safetensors"
NAMES = ("H2O", "Lambda", "TOVA")


@dataclass(frozen=True)
class Source:
    """Everything that trained features depend on; its hash names their folder.

    Attributes:
        base_model: identity and shape of the model.
        weights_hash: SHA-256 over a sample of every weight.
        dtype: what the model computed in.
        dataset: the text.
        tokens_hash: SHA-256 of the token ids, those that measure included.
        length: tokens of a sequence.
        cache: the cache that was trained for; its `less` is None.
        training: options.
    """

    base_model: BaseModel
    weights_hash: str
    dtype: str
    dataset: str
    tokens_hash: str
    length: int
    cache: CacheSpec
    training: LessTraining


@dataclass(frozen=True)
class Trained:
    """The whole of less.json.

    Attributes:
        format, format_version: what kind of file this is.
        created_by: program and version.
        source: what the features depend on.
        left: layer -> rank -> share of the layer's error under eviction that is left, held-out.
        error: layer -> that error, mean square after the output projection.
        ranks: R of each layer that evicts, as allotted; empty for the same everywhere.
        tensors_sha256: of less.safetensors.
    """

    format: Literal["kvsmith-less"]
    format_version: Literal[1]
    created_by: str
    source: Source
    left: dict[str, dict[str, float]]
    error: dict[str, float]
    ranks: tuple[int, ...]
    tensors_sha256: str


def write_trained(
    folder: Path,
    source: Source,
    left: Mapping[int, Mapping[int, float]],
    error: Mapping[int, float],
    ranks: tuple[int, ...],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write a result; the record comes last, so that a folder with one is whole."""
    write_safetensors(folder / TENSORS, tensors)
    named = {str(i): {str(r): x for r, x in by.items()} for i, by in left.items()}
    record = Trained(
        "kvsmith-less",
        1,
        f"kvsmith {kvsmith.__version__}",
        source,
        named,
        {str(i): e for i, e in error.items()},
        ranks,
        file_hash(folder / TENSORS),
    )
    write_json(folder / RECORD, record)


def read_trained(folder: Path) -> tuple[Trained, dict[str, Tensor]]:
    """Read a result.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        remedy = "Run train.py less=... for this model to its end."
        raise FileNotFoundError(explain(str(path), "file", "present", "nothing", remedy))
    record = from_dict(Trained, read_json(path), str(path))
    tensors = read_safetensors(folder / TENSORS)
    if file_hash(folder / TENSORS) != record.tensors_sha256:
        remedy = "Train again."
        raise ValueError(
            explain(str(folder / TENSORS), "sha256", "that of less.json", "another", remedy)
        )
    return record, tensors


def find_trained(
    root: Path, base: BaseModel, weights: str, wanted: CacheSpec, less: LessTraining
) -> Path:
    """The newest training of exactly this model that serves an eviction and a rank.

    Args:
        root: folder of a model's trainings.
        base: identity of the model.
        weights: hash of its weights.
        wanted: the cache; a training for its own budget goes before others of its policy.
        less: features and rank.

    Raises:
        FileNotFoundError: there is none.
    """
    found = []
    for path in sorted(root.glob(f"*/{RECORD}"), key=lambda p: (p.stat().st_mtime_ns, p)):
        source = from_dict(Trained, read_json(path), str(path)).source
        same = (source.base_model.config_hash, source.weights_hash) == (base.config_hash, weights)
        trained = source.training
        serves = trained.features == less.features and less.rank in trained.trained_ranks
        if same and serves and source.cache.eviction.kind == wanted.eviction.kind:
            found.append((source.cache.eviction == wanted.eviction, path.parent))
    if not found:
        expected = f"one with a training of rank {less.rank} for {wanted.eviction.kind}"
        remedy = "Run `python train.py less=...` with the same model, eviction and features."
        raise FileNotFoundError(explain(str(root), "folder", expected, "none", remedy))
    return max(enumerate(found), key=lambda item: (item[1][0], item[0]))[1][1]


def cut(spec: CacheSpec, base: BaseModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first features of trained tensors, as many as `spec` has in each layer.

    Raises:
        ValueError: a layer was not trained, or not to that rank.
    """
    assert spec.less is not None and not isinstance(spec.eviction, KeepAll)
    made = {}
    for name, info in less_parameters(spec, base.geometry).items():
        if name not in tensors:
            layers = evicting_layers(spec, base.geometry)
            raise ValueError(explain(name, "feature", f"trained, as layers {layers}", "nothing"))
        whole = tensors[name]
        if any(n > m for n, m in zip(info.shape, whole.shape, strict=True)):
            what = f"shape of {name}"
            expected = f"at most the trained {tuple(whole.shape)}"
            raise ValueError(explain("less.rank", what, expected, info.shape))
        made[name] = whole[tuple(slice(0, n) for n in info.shape)].contiguous()
    return made


def exported(less: LessTraining, ranks: tuple[int, ...]) -> Less:
    """The state of a bundle: allotted ranks where they were asked for."""
    return less.spec(ranks if less.allot else ())
