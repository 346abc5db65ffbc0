"""The whole way on the shipped model: `python -m kvsmith.pipeline.demo`.

Calibrate, export three codecs, evaluate them beside baselines, and generate with one of them. Each
step is what the command printed above it does; a step that is finished does no work again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import Cache, DynamicCache

import kvsmith
from kvsmith.pipeline import calibrate, evaluate, export
from kvsmith.pipeline.config import load, main_guard, output_path
from kvsmith.pipeline.data import token_blocks
from kvsmith.pipeline.evaluate import EvaluateConfig
from kvsmith.pipeline.evaluation.find import shown
from kvsmith.pipeline.evaluation.footprint import nbytes
from kvsmith.pipeline.evaluation.greedy import agreement, generate
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.model import input_device, load_model

CODECS = ("nuq4_o1", "nuq3_o1", "nuq2_o1")
SPOKEN = "nuq3_o1"  # the one that text is generated with
STEPS = 4


@dataclass(frozen=True)
class Demo:
    """What is shown; the defaults are the demo, and tests make it small.

    Args:
        model: overrides that name the model, for every step.
        calibrate, export, evaluate: further overrides of one step.
        prompt_tokens, new_tokens: of the generated text.
        prompt: which window of the held-out text is continued.
    """

    model: tuple[str, ...] = ("model=tiny",)
    calibrate: tuple[str, ...] = ()
    export: tuple[str, ...] = ()
    evaluate: tuple[str, ...] = ()
    prompt_tokens: int = 96
    new_tokens: int = 96
    prompt: int = 0


def run(demo: Demo, folder: Path) -> None:
    """Go the whole way.

    Args:
        demo: what is shown.
        folder: where the steps keep their logs and results.
    """
    began = time.monotonic()
    with Run(None) as log:
        log.say(f"kvsmith {kvsmith.__version__}: from a model and some text to a smaller KV cache")
        bundles = _make_bundles(demo, folder, log)
        config = load(EvaluateConfig, "evaluate", _evaluation(demo, bundles, log))
        evaluate.run(config, folder / "evaluate")
        _speak(demo, config, bundles[CODECS.index(SPOKEN)], log)
        log.say(f"\nTable, results and figures: {shown(folder / 'evaluate')}")
        log.say(f"Demo finished in {time.monotonic() - began:.0f} s.")


def _make_bundles(demo: Demo, folder: Path, log: Run) -> list[Path]:
    overrides = [*demo.model, *demo.calibrate]
    _header(log, 1, "calibrate: statistics of keys and values, codebooks fitted to them")
    _command(log, "calibrate.py", overrides)
    config = load(calibrate.CalibrateConfig, "calibrate", overrides)
    calibrate.run(config, folder / "calibrate")
    _header(log, 2, "export: one bundle a codec")
    bundles = []
    for codec in CODECS:
        overrides = [*demo.model, f"codec={codec}", *demo.export]
        _command(log, "export.py", overrides)
        exported = load(export.ExportConfig, "export", overrides)
        bundles.append(export.run(exported, folder / "export" / codec))
    return bundles


def _evaluation(demo: Demo, bundles: Sequence[Path], log: Run) -> list[str]:
    _header(log, 3, "evaluate: what the bundles cost and save, beside baselines")
    names = ",".join(shown(path) for path in bundles)
    overrides = [*demo.model, f"bundle=[{names}]", *demo.evaluate]
    _command(log, "evaluate.py", overrides)
    return overrides


def _speak(demo: Demo, config: EvaluateConfig, bundle: Path, log: Run) -> None:
    """Continue held-out text with the compressed cache and without."""
    _header(log, 4, "generate: the bundle in transformers")
    log.say(f"  cache = kvsmith.load({shown(bundle)!r}).cache(model)")
    log.say("  model.generate(**inputs, past_key_values=cache)")
    model, tokenizer = load_model(config.model)
    windows = token_blocks(
        tokenizer, config.data, "heldout", demo.prompt + 1, demo.prompt_tokens, seed=None
    )
    prompt = windows[demo.prompt :].to(input_device(model))
    caches = [DynamicCache(config=model.config), kvsmith.load(bundle).cache(model)]
    texts = [generate(model, partial(_same, c), prompt, demo.new_tokens, 1) for c in caches]
    log.say(f"\nprompt, from held-out text:\n{_quoted(tokenizer.decode(prompt[0]))}")
    for name, cache, text in zip(("full precision", SPOKEN), caches, texts, strict=True):
        log.say(
            f"\n{name}, {nbytes(cache):,} bytes of cache:\n{_quoted(tokenizer.decode(text[0]))}"
        )
    same = agreement(*texts)
    log.say(f"\n{same.length:.0f} of {same.new_tokens} tokens until the first difference.")


def _same(cache: Cache) -> Cache:
    return cache


def _quoted(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines())


def _header(log: Run, step: int, what: str) -> None:
    log.say(f"\n== {step}/{STEPS} {what}")


def _command(log: Run, script: str, overrides: Sequence[str]) -> None:
    log.say(f"$ python {script} {' '.join(overrides)}")


def main() -> int:
    """Run the demo; the process's exit code."""
    torch.manual_seed(0)
    folder = output_path(f"runs/demo/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    return main_guard(lambda: run(Demo(), folder))


if __name__ == "__main__":
    sys.exit(main())
