"""evaluate.py: what compressed caches cost and save, beside full precision and baselines.

Everything is measured through the cache that `model.generate` would use; nothing is simulated.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvsmith.errors import explain
from kvsmith.hf import geometry
from kvsmith.layout import check_geometry
from kvsmith.pipeline.calibration import weights_hash
from kvsmith.pipeline.calibration.predict import Quiet
from kvsmith.pipeline.codecs import load_codec
from kvsmith.pipeline.config import DebugConfig, output_path
from kvsmith.pipeline.data import DataConfig, data_name
from kvsmith.pipeline.evaluation.candidate import FULL, Candidate
from kvsmith.pipeline.evaluation.find import (
    baseline_candidates,
    bundle_candidates,
    codec_candidate,
    shown,
)
from kvsmith.pipeline.evaluation.material import Material, read_material
from kvsmith.pipeline.evaluation.measure import Measurement, Measuring
from kvsmith.pipeline.evaluation.options import (
    GreedyOptions,
    Options,
    RecallOptions,
    Sizes,
    SpeedOptions,
    WindowOptions,
    sizes,
)
from kvsmith.pipeline.evaluation.predict import predict, sample
from kvsmith.pipeline.evaluation.recovery import controls, recoveries
from kvsmith.pipeline.log import LoggerConfig, NoLogger, Run
from kvsmith.pipeline.model import ModelConfig, input_device, load_model, model_context
from kvsmith.pipeline.report import table
from kvsmith.pipeline.report.chart import drifts, memory
from kvsmith.pipeline.report.page import page, section
from kvsmith.pipeline.report.provenance import provenance, told
from kvsmith.pipeline.report.table import Row
from kvsmith.pipeline.stage import atomic_write, write_json
from kvsmith.spec import CacheSpec, CodecSpec
from kvsmith.strict import to_dict

SMOKE = Options(
    WindowOptions(count=2, length=128, batch=2),
    GreedyOptions(prompts=1, prompt_tokens=32, new_tokens=16),
    RecallOptions(texts=1, depths=(0.2, 0.7), key_tokens=16, cue_tokens=6),
    SpeedOptions(repeats=2, tokens=4),
)


@dataclass(frozen=True)
class EvaluateConfig:
    """What is compared, and on what.

    Args:
        model: the model.
        data: text; its held-out split is used.
        bundle: a folder or a list of them; None takes the newest bundle of each codec for the
            model, "none" takes none.
        codec: one codec in place of bundles: its newest bundle, else fitted to the newest
            calibration.
        bundles: where bundles are looked for.
        calibrations: where calibrations are looked for, for `codec` and histograms of codebooks.
        baselines: names of `conf/codec` that need no calibration.
        measure: what is measured.
        results: folder of finished measurements, which are not done again.
        dry_run: take one window the whole way, predict time, memory and disk, and keep nothing.
        logger: where else figures go.
        debug: `debug=smoke` measures on toy sizes, with one baseline.
    """

    model: ModelConfig
    data: DataConfig
    # A string or a list: both are written on the command line.
    bundle: Any = None
    bundles: str = "artifacts/bundles"
    calibrations: str = "artifacts/calibration"
    codec: CodecSpec | None = None
    baselines: tuple[str, ...] = ()
    measure: Options = field(default_factory=Options)
    results: str = "runs/evaluate/results"
    dry_run: bool = False
    logger: LoggerConfig = field(default_factory=NoLogger)
    debug: DebugConfig = field(default_factory=DebugConfig)

    def __post_init__(self) -> None:
        if self.codec is not None and self.bundle not in (None, "none"):
            remedy = "Leave one of the two out."
            raise ValueError(explain("bundle", "value", "null with codec", self.bundle, remedy))
        asked = self.bundle if isinstance(self.bundle, list) else [self.bundle or "none"]
        if not all(isinstance(path, str) for path in asked):
            raise TypeError(
                explain("bundle", "value", "a folder or a list of folders", repr(self.bundle))
            )

    @property
    def asked(self) -> list[str] | None:
        """Folders asked for; None takes the newest of each codec."""
        if self.bundle is None:
            return None
        if self.bundle == "none":
            return []
        return list(self.bundle) if isinstance(self.bundle, list) else [self.bundle]


def run(cfg: EvaluateConfig, folder: Path) -> list[Row]:
    """Measure, compare, and leave `results.json`, `table.md` and figures in `folder`.

    Args:
        cfg: what is compared.
        folder: this run's own folder.

    Returns:
        One row a candidate, by all-in bits, the largest first; none from a dry run.

    Raises:
        FileNotFoundError: no bundle is found.
        ValueError: a bundle belongs to another model, or the text or the model's context is too
            short.
    """
    if cfg.debug.smoke:
        m = cfg.measure
        small = replace(
            SMOKE,
            seed=m.seed,
            questions=replace(m.questions, count=2, new_tokens=16),
            summaries=replace(m.summaries, count=2, new_tokens=16),
        )
        cfg = replace(cfg, measure=small, baselines=cfg.baselines[:1])
    with Run(folder, cfg.logger, cfg) as log:
        began = time.monotonic()
        model, tokenizer = load_model(cfg.model)
        candidates = [FULL, *gather(cfg, model, log)]
        context = model_context(model.config)
        size = sizes(cfg.measure, context)
        material = read_material(cfg.measure, cfg.data, size, tokenizer, context)
        if cfg.dry_run:
            loading = time.monotonic() - began
            rehearse(cfg, candidates, model, material, loading, folder, log)
            return []
        material = material.to(input_device(model))
        measure = Measuring(model, material, cfg.measure, size, output_path(cfg.results), log)
        rows = table.ordered(candidates, measure(candidates))
        report(cfg, rows, size, model, folder, log)
        return rows


def rehearse(
    cfg: EvaluateConfig,
    candidates: Sequence[Candidate],
    model: PreTrainedModel,
    whole: Material,
    loading: float,
    folder: Path,
    log: Run,
) -> None:
    """Predict what the evaluation would take; leaves the prediction in `folder`."""
    context = model_context(model.config)
    few = replace(cfg, measure=sample(cfg.measure))
    size = sizes(few.measure, context)
    part = read_material(few.measure, cfg.data, size, whole.tokenizer, context)
    quiet = Quiet("evaluate")
    with tempfile.TemporaryDirectory() as kept:
        place = Path(kept)
        measure = Measuring(
            model, part.to(input_device(model)), few.measure, size, place / "results", quiet
        )
        began = time.monotonic()
        found = measure(candidates)
        ended = time.monotonic()
        report(few, table.ordered(candidates, found), size, model, place, quiet)
        loading += time.monotonic() - ended
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        windows, times = len(whole.windows), quiet.times
        made = predict(cfg.measure, size, windows, found, times, began, vocabulary, place)
    made = replace(made, seconds=made.seconds + loading)
    prints = [m.footprint for m in found]
    rows = [
        (c.name, f"{p.nbytes:,}", f"{p.bits_per_element:.2f}", f"{p.tokens_per_second:.1f}")
        for c, p in zip(candidates, prints, strict=True)
    ]
    columns = ("cache", "bytes", "bits", "tokens/s")
    log.table(f"One row of {size.length:,} tokens", columns, rows, "prediction")
    write_json(folder / "prediction.json", made)
    log.say(str(made))


def gather(cfg: EvaluateConfig, model: PreTrainedModel, log: Run) -> list[Candidate]:
    """The bundles and baselines that `cfg` names, for `model`."""
    root = output_path(cfg.bundles)
    baselines = []
    for name in cfg.baselines:
        spec = CacheSpec(load_codec(name, "baselines"))
        try:
            check_geometry(spec, geometry(model.config))
        except ValueError as error:  # the list is made for all models
            log.say(f"without the baseline {name}: {error}")
        else:
            baselines += baseline_candidates([name], model)
    if cfg.codec is None:
        bundles = bundle_candidates(cfg.asked, root, cfg.model.label, model)
        return [*bundles, *controls(bundles), *baselines]
    one = codec_candidate(cfg.codec, root, output_path(cfg.calibrations), cfg.model, model)
    return [one, *(b for b in baselines if b.name != one.name)]


def report(
    cfg: EvaluateConfig,
    rows: Sequence[Row],
    size: Sizes,
    model: PreTrainedModel,
    folder: Path,
    log: Run,
) -> None:
    """Show the table; write it as Markdown and JSON, and the figures."""
    title = f"{cfg.model.label} on held-out {data_name(cfg.data)}"
    lines = protocol(cfg, rows, size, model)
    log.say(title)
    for made in table.tables(rows):
        log.table(*made)
    found = [*table.comparisons(rows), *table.answered(rows), *table.summarised(rows)]
    found += recoveries(rows)
    for line in (*lines, *found):
        log.say(line)
    log.record("results", list(table.flat(rows[0])), [list(table.flat(r).values()) for r in rows])
    log.scalars(0, scalars(rows))
    atomic_write(folder / "table.md", table.markdown(title, lines, rows).encode())
    shape, weights = geometry(model.config), 2 * model.num_parameters()
    facts = {
        "title": title,
        **provenance(),
        "seed": cfg.measure.seed,
        "protocol": lines,
        "config": to_dict(cfg),
        "geometry": to_dict(shape),
        "weights": weights,
        "rows": [table.plain(row) for row in rows],
        "comparisons": found,
    }
    write_json(folder / "results.json", facts)
    drawn = figures(cfg, rows, model, folder, title, log)
    for name in drawn:
        log.image(folder / name)
    books = [folder / name for name in drawn if name.startswith("codebooks")]
    part = section(title, lines, rows, told(facts), books, shape, weights)
    atomic_write(folder / "report.html", page(title, [part]).encode())
    names = ["report.html", "table.md", "results.json", "results.csv", *drawn]
    log.say(f"written to {shown(folder)}: {', '.join(names)}")


def scalars(rows: Sequence[Row]) -> dict[str, float]:
    """Every number of every row, as `<method>/<figure>`."""
    return {
        f"{row.name}/{name}": float(value)
        for row in rows
        for name, value in table.flat(row).items()
        if isinstance(value, int | float)
    }


def protocol(
    cfg: EvaluateConfig, rows: Sequence[Row], size: Sizes, model: PreTrainedModel
) -> list[str]:
    """How it was measured, in sentences."""
    found = rows[0].found
    f, a, r, s = found.fidelity, found.agreement, found.recall, found.footprint
    o = cfg.measure
    dtype = str(model.dtype).removeprefix("torch.")
    return [
        f"Perplexity and KLD: {f.windows} windows of {size.length} tokens without overlap (seed "
        f"{o.seed}); {size.prefill} tokens read in one pass, then chunks of {o.windows.chunk} "
        f"through the cache; {f.tokens:,} tokens scored, all after the prefill. "
        f"{dtype} on {input_device(model).type}.",
        f"Greedy: {a.prompts} prompts of {o.greedy.prompt_tokens} tokens, {a.new_tokens} new ones; "
        "drift: the same of full precision, read token by token. "
        f"Recall: {r.keys} random strings ({o.recall.texts} texts of "
        f"{' and '.join(map(str, size.texts))} tokens x {len(o.recall.depths)} depths), and "
        f"{len(o.recall.depths)} at once in the longest; {o.recall.cue_tokens} tokens given, "
        f"{r.tokens} to copy.",
        *_exam(cfg, found),
        *_task(cfg, found),
        f"Bytes and speed: one row of {s.length} tokens; median of {s.repeats} x {s.timed_tokens} "
        f"tokens, one at a time, {torch.get_num_threads()} threads.",
    ]


def _exam(cfg: EvaluateConfig, found: Measurement) -> list[str]:
    q = cfg.measure.questions
    if found.answers is None or q.path is None:
        return []
    return [
        f"Answers: {found.answers.questions} questions of {Path(q.path).name} (seed "
        f"{cfg.measure.seed}), {q.shots} examples, {q.new_tokens} tokens, greedy, exact match of "
        "the final answer; full precision answers the same questions."
    ]


def _task(cfg: EvaluateConfig, found: Measurement) -> list[str]:
    t = cfg.measure.summaries
    if found.rouge is None or t.path is None:
        return []
    return [
        f"Summaries: {found.rouge.documents} documents of {Path(t.path).name} (seed "
        f"{cfg.measure.seed}), {t.shots} examples, at most {t.new_tokens} tokens, greedy; F1 "
        "scores of ROUGE over lower-case words, without stemming."
    ]


def figures(
    cfg: EvaluateConfig,
    rows: Sequence[Row],
    model: PreTrainedModel,
    folder: Path,
    title: str,
    log: Run,
) -> list[str]:
    """Draw what can be drawn; the names of the files."""
    if importlib.util.find_spec("matplotlib") is None:
        log.say("no figures: matplotlib is not installed (pip install 'kvsmith[report]')")
        return []
    from kvsmith.pipeline.report.codebooks import calibration_of, plot_codebooks, read_codebooks
    from kvsmith.pipeline.report.plots import plot_chart, plot_losses

    names = []
    shape = geometry(model.config)
    for name, chart in (
        ("drift", drifts(rows)),
        ("memory", memory(rows, shape, 2 * model.num_parameters())),
    ):
        if chart.series:
            names.append(f"{name}.png")
            plot_chart(chart, folder / names[-1])
    if len(rows) > 1:
        plot_losses(rows, folder / "losses.png", title)
        names.append("losses.png")
    root, weights = output_path(cfg.calibrations) / cfg.model.label, weights_hash(model)
    for row in rows:
        source = calibration_of(row.candidate, root, weights)
        books = read_codebooks(row.candidate, source) if source else []
        if books:
            names.append(f"codebooks-{row.name}.png")
            plot_codebooks(books, folder / names[-1], row.name)
    return names
