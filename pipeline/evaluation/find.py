"""Finds the candidates: bundles by folder or the newest of each codec, baselines by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

import kvsmith
from kvsmith.bundle import expected_tensors
from kvsmith.errors import explain
from kvsmith.hf import geometry
from kvsmith.layout import check_geometry
from kvsmith.pipeline.calibration import find_calibration, parameters_for, read_record
from kvsmith.pipeline.codecs import codec_name as named
from kvsmith.pipeline.codecs import uncalibrated
from kvsmith.pipeline.config import input_path, output_path
from kvsmith.pipeline.evaluation.candidate import Candidate
from kvsmith.pipeline.model import ModelConfig
from kvsmith.spec import CacheSpec, CodecSpec

MANIFEST = "manifest.json"


def bundle_candidates(
    asked: Sequence[str] | None, root: Path, label: str, model: PreTrainedModel
) -> list[Candidate]:
    """Load the bundles to evaluate.

    Args:
        asked: folders; None takes the newest of each codec in `root`/`label` that fits the model.
        root: folder of all bundles.
        label: the model's word in paths.
        model: the model.

    Raises:
        FileNotFoundError: a folder holds no bundle, or there is none for the model.
        ValueError: a bundle is damaged, or one that was asked for belongs to another model.
    """
    if asked is None:
        found = _newest(root / label, label, model)
    else:
        found = [(folder, kvsmith.load(folder)) for folder in map(_bundle_folder, asked)]
    names = [codec_name(folder) for folder, _ in found]
    candidates = []
    for (folder, bundle), name in zip(found, names, strict=True):
        bundle.cache(model)  # refuses a model that the bundle was not made for
        label = name if names.count(name) == 1 else folder.name
        facts = (bundle.spec, bundle.parameters, bundle.manifest.calibration)
        candidates.append(Candidate(label, "bundle", shown(folder), *facts))
    return candidates


def codec_candidate(
    codec: CodecSpec, root: Path, calibrations: Path, cfg: ModelConfig, model: PreTrainedModel
) -> Candidate:
    """One codec: as it is where it owns no parameters, from its newest bundle, or fitted to the
    model's newest calibration.

    Args:
        codec: how tokens are stored.
        root: folder of all bundles.
        calibrations: folder of all calibrations.
        cfg: how the model was loaded.
        model: the model.

    Raises:
        FileNotFoundError: the codec needs a bundle or a calibration, and there is neither.
        ValueError: it does not fit the model or its statistics.
    """
    name, shape = named(codec), geometry(model.config)
    if not expected_tensors(CacheSpec(codec), shape):
        check_geometry(CacheSpec(codec), shape)
        return Candidate(name, "baseline", f"conf/codec/{name}.yaml", CacheSpec(codec))
    for folder in _newest_first(root / cfg.label):
        if codec_name(folder) != name:
            continue
        bundle = kvsmith.load(folder)
        same = bundle.spec == CacheSpec(codec, page_size=bundle.spec.page_size)
        if same and _fits(bundle, model):
            facts = (bundle.spec, bundle.parameters, bundle.manifest.calibration)
            return Candidate(name, "bundle", shown(folder), *facts)
    folder = find_calibration(calibrations, cfg, model, codec)
    parameters = parameters_for(folder, codec)
    provenance = read_record(folder).provenance("fisher")
    return Candidate(name, "bundle", shown(folder), CacheSpec(codec), parameters, provenance)


def _newest_first(root: Path) -> list[Path]:
    """Folders of bundles, the newest first."""
    folders = [path.parent for path in root.glob(f"*/{MANIFEST}")]
    return sorted(folders, key=lambda p: ((p / MANIFEST).stat().st_mtime_ns, p), reverse=True)


def _newest(root: Path, label: str, model: PreTrainedModel) -> list[tuple[Path, kvsmith.Bundle]]:
    """The newest fitting bundle of each codec, in the order of their names."""
    found: dict[str, tuple[Path, kvsmith.Bundle]] = {}
    for folder in _newest_first(root):
        if codec_name(folder) not in found:
            bundle = kvsmith.load(folder)
            if _fits(bundle, model):
                found[codec_name(folder)] = (folder, bundle)
    if not found:
        remedy = (
            f"Run `python calibrate.py model={label}` and `python export.py model={label} "
            "codec=kvquant_nuq3_o1`, or give bundle=DIR; bundle=none measures the baselines alone."
        )
        expected = "one with bundles for this model"
        raise FileNotFoundError(explain(shown(root), "folder", expected, "none", remedy))
    return [found[name] for name in sorted(found)]


def _fits(bundle: kvsmith.Bundle, model: PreTrainedModel) -> bool:
    try:
        bundle.cache(model)
    except kvsmith.BundleError:
        return False
    return True


def _bundle_folder(path: str) -> Path:
    folder = input_path(path)
    if not (folder / MANIFEST).is_file():
        expected = f"the folder of a bundle ({MANIFEST} in it)"
        raise FileNotFoundError(explain("bundle", "value", expected, repr(path)))
    return folder


def codec_name(folder: Path) -> str:
    """The codec's word in a bundle's folder name, `<codec>-<hash8>`."""
    return re.sub(r"-[0-9a-f]{8}$", "", folder.name)


def baseline_candidates(names: Sequence[str], model: PreTrainedModel) -> list[Candidate]:
    """Caches from `conf/codec/<name>.yaml` that need no calibration.

    Raises:
        ValueError: there is no such file, the codec needs a bundle, or it does not fit the model's
            shape.
    """
    shape = geometry(model.config)
    candidates = []
    for name in names:
        spec = uncalibrated(name, shape, "baselines")
        check_geometry(spec, shape)
        candidates.append(Candidate(name, "baseline", f"conf/codec/{name}.yaml", spec))
    return candidates


def shown(path: Path) -> str:
    """A path as readers know it: relative to the repository where it lies in it."""
    root = output_path(".").resolve()
    return (
        path.resolve().relative_to(root).as_posix()
        if path.resolve().is_relative_to(root)
        else path.as_posix()
    )
