"""What calibrate.py is asked for; `conf/calibrate.yaml`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from kvsmith.errors import explain
from kvsmith.eviction.policy import KeepAll
from kvsmith.pipeline.budget.options import BudgetOptions
from kvsmith.pipeline.config import DebugConfig
from kvsmith.pipeline.data import DataConfig
from kvsmith.pipeline.fit import Sensitivity
from kvsmith.pipeline.less.options import EvictionChoice
from kvsmith.pipeline.log import LoggerConfig, NoLogger
from kvsmith.pipeline.model import ModelConfig
from kvsmith.spec import CodecSpec


@dataclass(frozen=True)
class CalibrateConfig:
    """What is calibrated, and on what.

    Args:
        model: the model.
        data: text; its calibration split is used.
        codec: one more codec to fit; None fits `codecs` alone.
        codecs: names of `conf/codec` whose parameters are fitted.
        eviction: calibration does not depend on it.
        samples: sequences.
        length: tokens of a sequence.
        batch_size: sequences a forward and backward pass.
        shards: parts of the pass that processes divide among them; the statistics depend on it (by
            rounding), and not on the number of processes.
        sinks: first tokens of every sequence that are left out; the codecs' number of sinks.
        seed: of the choice of sequences.
        fisher: collect Fisher information, which takes the backward pass.
        sensitivity: weights of the codebook fit: fisher, fisher_scale or none.
        max_fraction: largest share of outliers that key ranges can be fitted with later.
        value_fractions: shares of outliers that values are observed with.
        target_bits: all-in bits an element of a cache whose layers share them best; writes its
            bundle.
        curve: the best caches from the smallest to the largest.
        fit: how such caches are found.
        bundles: folder of all bundles; None is `artifacts/bundles`, or with `debug=smoke` the
            folder of this run's logs.
        checkpoint_seconds: time between checkpoints of the pass.
        dry_run: take one sample the whole way, predict time, memory and disk, and keep nothing.
        folder: where calibrations go; None is `artifacts/calibration`, or with `debug=smoke` the
            folder of this run's logs.
        logger: where else figures go.
        debug: `debug=smoke` takes a few short sequences.
    """

    model: ModelConfig
    data: DataConfig
    codec: CodecSpec | None = None
    codecs: tuple[str, ...] = ()
    eviction: EvictionChoice = field(default_factory=KeepAll)
    samples: int = 64
    length: int = 512
    batch_size: int = 8
    shards: int = 8
    sinks: int = 4
    seed: int = 0
    fisher: bool = True
    sensitivity: Sensitivity = "fisher"
    max_fraction: float = 0.02
    value_fractions: tuple[float, ...] = (0.0, 0.01)
    target_bits: float | None = None
    curve: bool = False
    fit: BudgetOptions = field(default_factory=BudgetOptions)
    bundles: str | None = None
    checkpoint_seconds: float = 20.0
    dry_run: bool = False
    folder: str | None = None
    logger: LoggerConfig = field(default_factory=NoLogger)
    debug: DebugConfig = field(default_factory=DebugConfig)

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("batch_size", 1), ("shards", 1), ("sinks", 0)):
            if getattr(self, name) < least:
                raise ValueError(explain(name, "value", f"at least {least}", getattr(self, name)))
        if self.length < self.sinks + 2:
            expected = f"at least sinks + 2 = {self.sinks + 2}"
            raise ValueError(explain("length", "tokens of a sequence", expected, self.length))
        for name, values in (
            ("max_fraction", (self.max_fraction,)),
            ("value_fractions", self.value_fractions),
        ):
            for value in values:
                if not 0 <= value < 0.5:
                    raise ValueError(explain(name, "share of elements", "in [0, 0.5)", value))
        if not self.fisher and self.sensitivity != "none":
            remedy = "Use sensitivity=none, or fisher=true."
            raise ValueError(
                explain("sensitivity", "value", "none with fisher=false", self.sensitivity, remedy)
            )


def smoke(cfg: CalibrateConfig, folder: Path) -> CalibrateConfig:
    """The same on a few short sequences, away from calibrations that export.py would find."""
    return replace(
        cfg,
        samples=min(cfg.samples, 4),
        length=min(cfg.length, 128),
        batch_size=min(cfg.batch_size, 2),
        folder=cfg.folder or str(folder / "calibration"),
        bundles=cfg.bundles or str(folder / "bundles"),
        fit=replace(cfg.fit, windows=2, check=2, length=min(cfg.fit.length or 64, 64), points=2),
    )
