"""docs/MODELS.md, from what the architecture tests measure."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

PAGE = Path(__file__).resolve().parents[2] / "docs" / "MODELS.md"
HEAD = """# Models

Written by `make models`, which runs the architecture tests and fails where one does. Random models
of 4 layers, batch of 2 with left padding, {versions}, CPU, float32.

- *way*: "deferred" families hand over keys before RoPE; "dense" ones rotate and attend themselves.
- *logits*: largest difference from DynamicCache with nothing compressed, prompt and decode in five
  steps, relative to the largest logit. Greedy, beam and assisted output: the same token for token.
- *4 bits*: keys and values calibrated and stored as 4-bit NUQ with 5 % outliers. Bits of the pages
  per element at 300 tokens (short, so the last page's slack shows), and mean logit error in
  standard deviations of the logits.

Refused by name: encoder-decoder models, multi-head latent attention (DeepSeek V2 and V3).

| architecture | class | way | KV layers | heads | head dim | logits | 4 bits | error |
|---|---|---|---|---|---|---|---|---|
"""


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Collects figures by family; writes the page at the end when asked to."""
    rows: dict[str, dict[str, Any]] = {}

    def note(family: str, **figures: Any) -> None:
        rows.setdefault(family, {}).update(figures)

    yield note
    if request.config.getoption("--models-page") and not request.session.testsfailed:
        versions = (
            f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
        )
        lines = [
            f"| {family} | {r['name']} | {r['way']} | {r['layers']} | {r['heads']} | {r['dim']} "
            f"| {r['logits']:.0e} | {r['bits']:.2f} | {r['error']:.2f} |"
            for family, r in rows.items()
        ]
        PAGE.write_text(HEAD.format(versions=versions) + "\n".join(lines) + "\n")
