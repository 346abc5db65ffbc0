"""lm-evaluation-harness through a compressed cache, with full precision beside it.

    python -m kvsmith.pipeline.harness --model DIR --bundle DIR --tasks arc_easy --limit 100

Scores of given text come from one forward pass in the harness, which no cache takes part in. Here
the text is read in chunks through the cache instead, so that all but the newest tokens are seen as
stored; generation uses the cache as it is. Each run measures full precision in the same chunks.
The harness is not among kvsmith's requirements: `pip install lm_eval`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from transformers import Cache, DynamicCache

from kvsmith.bundle import Bundle
from kvsmith.hf.compress import compress
from kvsmith.pipeline.log import Run
from kvsmith.pipeline.stage import write_json

CHUNK = 32


@register_model("kvsmith")
class CompressedLM(HFLM):  # type: ignore[misc]
    """A transformers model with the cache of a bundle; `--model kvsmith` of the harness.

    Args:
        bundle: folder or hub name; None keeps everything in full precision.
        chunk: tokens read at once where text is scored; see `evaluation.forced`.
        options: of the harness's own class for transformers models, `pretrained` among them.
    """

    def __init__(self, bundle: str | None = None, chunk: int | str = CHUNK, **options: Any) -> None:
        super().__init__(**options)
        self._chunk = int(chunk)
        self._bundle = None if bundle is None else Bundle.from_pretrained(bundle)
        self._new_cache()  # refuses another model at once

    def _new_cache(self) -> Cache:
        if self._bundle is None:
            return DynamicCache(config=self.model.config)
        return self._bundle.cache(self.model)

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        cache = self._new_cache()
        with torch.no_grad():
            parts = [
                self.model(input_ids=piece, past_key_values=cache, use_cache=True).logits
                for piece in inps.split(self._chunk, dim=1)
            ]
        return torch.cat(parts, dim=1)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._bundle is None:
            return super()._model_generate(*args, **kwargs)
        with compress(self.model, self._new_cache):
            return super()._model_generate(*args, **kwargs)


def compare(
    make: Callable[[str | None], HFLM],
    bundles: Sequence[str],
    tasks: Sequence[str],
    limit: int | None,
    include: str | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Full precision and bundles on the same tasks.

    Args:
        make: gives the adapter for a bundle, None for full precision.
        bundles: folders or hub names.
        tasks: of the harness, or of `include`.
        limit: documents of each task; None is all.
        include: folder of further task files.

    Returns:
        candidate -> task -> metric -> value, standard errors among them.
    """
    manager = TaskManager(include_path=include)
    found = {}
    for name in (None, *bundles):
        results = simple_evaluate(
            make(name), tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=1000
        )
        assert results is not None
        found[name or "full precision"] = {
            task: {k: v for k, v in values.items() if isinstance(v, (int, float))}
            for task, values in results["results"].items()
        }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare and print; `--output` also writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--bundle", nargs="+", default=[], help="folders or hub names")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--limit", type=int, help="documents of each task")
    parser.add_argument("--include", help="folder of further task files")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="tokens read at once")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="JSON file")
    asked = parser.parse_args(arguments)

    def make(bundle: str | None) -> HFLM:
        options = {"batch_size": asked.batch, "device": asked.device, "chunk": asked.chunk}
        return CompressedLM(pretrained=asked.model, bundle=bundle, **options)

    found = compare(make, asked.bundle, asked.tasks, asked.limit, asked.include)
    rows = [
        (task, metric.split(",")[0], candidate, f"{value:.4f}")
        for candidate, results in found.items()
        for task, values in results.items()
        for metric, value in values.items()
    ]
    with Run(None) as log:
        log.table("lm-evaluation-harness", ("task", "metric", "cache", "value"), sorted(rows))
    if asked.output:
        write_json(Path(asked.output), json.loads(json.dumps(found)))


if __name__ == "__main__":
    main(sys.argv[1:])
