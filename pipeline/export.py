"""export.py: from a finished calibration to a bundle, or to a checkpoint for other engines.

The name of the bundle's folder is `<codec>-<hash8>`; the hash covers the cache, the base model,
where the parameters come from, and the parameters, so that equal names mean equal caches.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvsmith.bundle import BaseModel, Bundle, Calibration, base_model, expected_tensors
from kvsmith.bundle.card import sizes
from kvsmith.errors import explain
from kvsmith.eviction.policy import KeepAll
from kvsmith.hf import geometry
from kvsmith.layout import check_geometry
from kvsmith.pipeline.calibration import (
    Record,
    amax_of,
    bases_of,
    check_model,
    find_calibration,
    parameters_for,
    read_record,
    weights_hash,
)
from kvsmith.pipeline.codecs import codec_name, codec_word
from kvsmith.pipeline.config import DebugConfig, config_hash, input_path, output_path
from kvsmith.pipeline.data import DataConfig, PydocsData, data_name, token_blocks, tokens_hash
from kvsmith.pipeline.delta import delta_of
from kvsmith.pipeline.evaluation.find import shown
from kvsmith.pipeline.fit import Sensitivity
from kvsmith.pipeline.fp8_checkpoint import Checkpoint, Weights, model_folder, scales_of
from kvsmith.pipeline.interop.kvquant import read_quantizers
from kvsmith.pipeline.interop.rotations import read_rotations
from kvsmith.pipeline.less.options import EvictionChoice, LessTraining, context_of, resolve
from kvsmith.pipeline.less.result import cut, exported, find_trained, read_trained
from kvsmith.pipeline.log import LoggerConfig, NoLogger, Run
from kvsmith.pipeline.model import ModelConfig, load_config, load_model
from kvsmith.pipeline.quality import read_quality
from kvsmith.pipeline.stage import file_hash, locked
from kvsmith.spec import CacheSpec, CodecSpec
from kvsmith.strict import to_dict
from kvsmith.version import __version__

SHARD = "cache.safetensors"


@dataclass(frozen=True)
class ExportConfig:
    """What is exported.

    Args:
        model: the base model.
        codec: how a token is stored.
        eviction: which tokens stay.
        less: set by `less=...`, which sets the eviction too: the state that was trained for it.
        trained: folder that train.py wrote; None is the newest fitting one of the model.
        trainings: where they are looked for.
        page_size: tokens by which a cache grows.
        sensitivity: weights of the codebook fit.
        calibration: folder of a finished calibration; None is the newest one of the model.
        quantizers: `quantizers.pickle` of KVQuant's own program, in place of a calibration.
        rotations: files of rotations of keys and of values, for a codec with `rotation: given`;
            None takes them from the queries and outputs of the calibration's text.
        calibrations: where calibrations are looked for.
        quality: JSON file with measured numbers; None writes none.
        delta: model that this one was trained from, or `auto` for the one in training.json: the
            bundle also gets the weights that differ. None leaves weights out.
        format: a bundle, or a checkpoint with 8-bit cache scales (`compressed-tensors`), which
            leaves codec, eviction and quality aside.
        data: the calibration's text; only the checkpoint needs it.
        weights: the checkpoint has a copy of the model's weights, or links to them.
        checkpoints: folder of all checkpoints; None as for `bundles`.
        bundles: folder of all bundles; None is `artifacts/bundles`, or with `debug=smoke` the
            folder of this run's logs.
        debug: `debug=smoke` leaves the bundles of others alone.
        logger: where else figures go.
    """

    model: ModelConfig
    codec: CodecSpec
    eviction: EvictionChoice = field(default_factory=KeepAll)
    less: LessTraining | None = None
    trained: str | None = None
    trainings: str = "artifacts/less"
    page_size: int = 128
    sensitivity: Sensitivity = "fisher"
    calibration: str | None = None
    quantizers: str | None = None
    rotations: tuple[str, str] | None = None
    calibrations: str = "artifacts/calibration"
    quality: str | None = None
    delta: str | None = None
    format: Literal["bundle", "compressed-tensors"] = "bundle"
    data: DataConfig = field(default_factory=PydocsData)
    weights: Weights = "copy"
    bundles: str | None = None
    checkpoints: str | None = None
    debug: DebugConfig = field(default_factory=DebugConfig)
    logger: LoggerConfig = field(default_factory=NoLogger)


def run(cfg: ExportConfig, folder: Path) -> Path:
    """Write the bundle, and say where it is and what it costs.

    Args:
        cfg: what is exported.
        folder: this run's own folder.

    Returns:
        Folder of the bundle, or of the checkpoint.

    Raises:
        FileNotFoundError: the model or its calibration is missing.
        ValueError: the codec, the calibration or the numbers do not fit the model.
    """
    with Run(folder, cfg.logger, cfg) as log:
        if cfg.format == "compressed-tensors":
            if cfg.delta is not None:
                expected = "null with format=compressed-tensors, which has all weights"
                raise ValueError(explain("delta", "value", expected, cfg.delta))
            return write_checkpoint(cfg, folder, log)
        bundle, name = make_bundle(cfg, log)
        path = bundles_folder(cfg, folder) / cfg.model.label / name
        before = path.stat().st_ino if path.is_dir() else None
        bundle.save_pretrained(path, overwrite=True)
        report(bundle, path, log)
        log.say(f"{'unchanged' if path.stat().st_ino == before else 'written'}: {shown(path)}")
        return path


def bundles_folder(cfg: ExportConfig, folder: Path) -> Path:
    """Where bundles go; `folder` is this run's own."""
    if cfg.bundles is None and cfg.debug.smoke:
        return folder / "bundles"
    return output_path(cfg.bundles or "artifacts/bundles")


def write_checkpoint(cfg: ExportConfig, folder: Path, log: Run) -> Path:
    """Write `<model>-fp8kv`, and say which scales it has; arguments and result as of `run`."""
    model, tokenizer = load_model(cfg.model)
    calibration = calibration_folder(cfg, model)
    record = read_record(calibration)
    check_model(record, cfg.model, model, calibration)
    log.say(f"calibration: {shown(calibration)}")

    with locked(calibration):
        amax = amax_of(calibration, record, partial(text_of, cfg, record, model, tokenizer), log)
    scales = scales_of(model, record.source.base_model.geometry, amax)
    smoke = cfg.checkpoints is None and cfg.debug.smoke
    root = folder if smoke else output_path(cfg.checkpoints or "artifacts/checkpoints")
    target = root / f"{cfg.model.label}-fp8kv"
    Checkpoint(model_folder(cfg.model), target, scales, cfg.weights).write()
    rows = [(name, f"{float(scale):.6g}") for name, scale in scales.items()]
    log.table("Scales of float8 (e4m3)", ("tensor", "scale"), rows, "scales")
    log.say(f"written: {shown(target)}")
    return target


def text_of(
    cfg: ExportConfig, record: Record, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, Tensor]:
    """The model, and the tokens of its calibration.

    Raises:
        ValueError: `data` gives other tokens.
    """
    s = record.source
    blocks = token_blocks(tokenizer, cfg.data, "calibration", s.samples, s.length, seed=s.seed)
    if tokens_hash(blocks) != s.tokens_hash:
        remedy = "Set data= as it was for calibrate.py, or calibrate again."
        got = f"other tokens in data={data_name(cfg.data)}"
        raise ValueError(explain("data", "text", "that of the calibration", got, remedy))
    return model, blocks


def make_bundle(cfg: ExportConfig, log: Run) -> tuple[Bundle, str]:
    """The bundle and the name of its folder.

    Raises:
        FileNotFoundError, ValueError: as `run`.
    """
    config = load_config(cfg.model)
    base = describe(cfg.model, config)
    spec = CacheSpec(cfg.codec, resolve(cfg.eviction, context_of(config)), cfg.page_size)
    check_geometry(spec, base.geometry)
    calibration: Calibration | None = None
    parameters: dict[str, Tensor] = {}
    program = None
    if cfg.quantizers is not None:
        path = input_path(cfg.quantizers)
        parameters = read_quantizers(path, cfg.codec, base.geometry)
        program = f"kvsmith {__version__}, quantizers of KVQuant {file_hash(path)[:16]}"
    elif cfg.rotations is not None:
        keys, values = map(input_path, cfg.rotations)
        parameters = read_rotations((keys, values), cfg.codec, base.geometry)
        program = (
            f"kvsmith {__version__}, rotations {file_hash(keys)[:16]} {file_hash(values)[:16]}"
        )
    elif cfg.codec.takes_rotations:
        calibration, parameters = turned(cfg, base, log)
    elif expected_tensors(spec, base.geometry):
        calibration, parameters = calibrated(cfg, base, log)
    if cfg.less is not None:
        spec, features = with_state(cfg, cfg.less, spec, base, log)
        parameters = parameters | features
    change = (None, None) if cfg.delta is None else delta_of(cfg.model, cfg.delta, base, log)
    bundle = Bundle.create(spec, parameters, base, calibration, None, program, *change)
    name = f"{cache_name(spec)}-{identity(bundle)}"
    if cfg.quality is not None:
        quality = read_quality(input_path(cfg.quality), name)
        bundle = Bundle.create(spec, parameters, base, calibration, quality, program, *change)
    return bundle, name


def describe(cfg: ModelConfig, config: PreTrainedConfig) -> BaseModel:
    """Identity of a model from its configuration: the hub's name, or the word of a local one."""
    local = input_path(cfg.path).is_dir()
    text: Any = config.get_text_config(decoder=True)
    revision = None if local else getattr(config, "_commit_hash", None) or cfg.revision
    return base_model(text.to_dict(), geometry(config), cfg.label if local else cfg.path, revision)


def cache_name(spec: CacheSpec) -> str:
    """A word for folders: codec, eviction with its budget, and rank of the state."""
    if isinstance(spec.eviction, KeepAll):
        return codec_name(spec.codec)
    name = codec_word(spec.codec)
    state = "" if spec.less is None else f"-less{spec.less.rank}"
    return f"{name}-{spec.eviction.kind}{spec.eviction.budget}{state}"


def with_state(
    cfg: ExportConfig, less: LessTraining, spec: CacheSpec, base: BaseModel, log: Run
) -> tuple[CacheSpec, dict[str, Tensor]]:
    """The cache with the state that was trained for it, and its features.

    Raises:
        FileNotFoundError, ValueError: there is no such training, or it does not fit.
    """
    if isinstance(spec.eviction, KeepAll):
        raise ValueError(explain("less", "eviction", "one that evicts", "keep_all"))
    if cfg.trained is not None:
        folder = input_path(cfg.trained)
    else:
        weights = weights_hash(load_model(cfg.model)[0])
        root = output_path(cfg.trainings) / cfg.model.label
        folder = find_trained(root, base, weights, spec, less)
    record, tensors = read_trained(folder)
    record.source.base_model.check(base, str(folder))
    log.say(f"trained state: {shown(folder)}")
    whole = replace(spec, less=exported(less, record.ranks))
    return whole, cut(whole, base, tensors)


def calibrated(
    cfg: ExportConfig, base: BaseModel, log: Run
) -> tuple[Calibration, dict[str, Tensor]]:
    """Provenance and parameters from the calibration that `cfg` names, or the newest fitting one.

    Only looking for it takes the model's weights: they tell whether it was made for them.
    """
    model = load_model(cfg.model)[0] if cfg.calibration is None else None
    folder = calibration_folder(cfg, model)
    record = read_record(folder)
    record.source.base_model.check(base, str(folder))
    log.say(f"calibration: {shown(folder)}")
    parameters = parameters_for(folder, cfg.codec, log, cfg.sensitivity)
    return record.provenance(cfg.sensitivity), parameters


def turned(cfg: ExportConfig, base: BaseModel, log: Run) -> tuple[Calibration, dict[str, Tensor]]:
    """Provenance, and rotations from the queries and outputs of a calibration's text.

    Raises:
        FileNotFoundError, ValueError: no calibration, other text, or a codec that also has
            codebooks.
    """
    model, tokenizer = load_model(cfg.model)
    folder = calibration_folder(cfg, model)
    record = read_record(folder)
    check_model(record, cfg.model, model, folder)
    log.say(f"calibration: {shown(folder)}")
    with locked(folder):
        found = bases_of(folder, record, partial(text_of, cfg, record, model, tokenizer), log)
    wanted = expected_tensors(CacheSpec(cfg.codec), base.geometry)
    if other := sorted(wanted.keys() - found.keys()):
        expected, remedy = "of rotations alone", "Use table: nf, or uniform levels."
        raise ValueError(explain("codec", "parameters", expected, other[0], remedy))
    return record.provenance("none"), {name: found[name] for name in wanted}


def calibration_folder(cfg: ExportConfig, model: PreTrainedModel | None) -> Path:
    """The calibration that `cfg` names, or the newest one of the model's weights."""
    if cfg.calibration is not None:
        return input_path(cfg.calibration)
    assert model is not None
    codec = cfg.codec if cfg.format == "bundle" else None
    return find_calibration(output_path(cfg.calibrations), cfg.model, model, codec)


def identity(bundle: Bundle) -> str:
    """8 hexadecimal digits over everything but the measured quality and the program's version."""
    manifest = bundle.manifest
    shard = manifest.files.get(SHARD)
    facts: dict[str, object] = {
        "base_model": manifest.base_model,
        "cache": manifest.cache,
        "calibration": manifest.calibration,
        "parameters": None if shard is None else shard.sha256,
    }
    if manifest.delta is not None:
        files = {name: manifest.files[name] for name in manifest.delta.files}
        facts |= {"delta": manifest.delta, "weights": files}
    return config_hash({name: to_dict(fact) for name, fact in facts.items()}, exclude=())


def report(bundle: Bundle, path: Path, log: Run) -> None:
    """A short table: bits an element at three lengths, and the bundle's own size."""
    bits = sizes(bundle.manifest)
    size = sum(p.stat().st_size for p in path.iterdir())
    columns = ("codec", *(f"bits at {label}" for label in bits), "bundle bytes")
    row = (codec_name(bundle.spec.codec), *(f"{b:.3f}" for b in bits.values()), f"{size:,}")
    title = "All-in bits per element (batch 1, dense tokens in bfloat16)"
    log.table(title, columns, [row], "bits")
    log.scalars(0, {f"bits_per_element/{label}": b for label, b in bits.items()} | {"bytes": size})
    log.artifact(path, "bundle", {"codec": row[0], "base_model": bundle.manifest.base_model.id})
