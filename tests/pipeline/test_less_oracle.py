"""Scores of full attention: the replay with them is H2O as published, at the budget's own steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvsmith.eviction.policy import H2O
from kvsmith.hf import make_cache
from kvsmith.pipeline.less import oracle
from kvsmith.pipeline.less.record import replay
from kvsmith.spec import CacheSpec
from kvsmith.stores import make_store
from tests.micro_model import write_model, write_text
from tests.pipeline.test_less import CODEC, activations
from tests.runtime.models import build


@pytest.mark.parametrize("family", ["llama", "falcon-alibi-mqa"])
def test_scores_are_column_sums_of_full_attention(family: str) -> None:
    model = build(family, layers=1)
    ids = torch.randint(3, 97, (2, 61))
    (seen,) = activations(model, ids)
    lse = oracle.whole_lse(seen)
    spec = CacheSpec(CODEC, H2O(24, recent=6), page_size=16)
    store = make_store(spec, make_cache(model, spec).geometry, 0, {})
    assert replay(seen, store, lse) is not None  # type: ignore[arg-type]
    k = seen.turn(seen.k, seen.rope).double().repeat_interleave(4 // seen.k.shape[1], 1)
    logits = seen.q.double() @ k.mT * seen.scores.scale
    if seen.bias is not None:
        logits = logits + seen.bias.mask.double()
    logits = logits.masked_fill(~torch.ones(61, 61).tril().bool(), float("-inf"))
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=0, atol=1e-5)
    attention = logits.softmax(-1).unflatten(1, (seen.k.shape[1], -1)).sum(2)
    # A token's score is all the attention that it got up to the last step, of which 60 were made.
    received = attention[:, :, :60].sum(2)
    slots = store.slots  # type: ignore[union-attr]
    columns = slots.columns[:, :, : slots.used].long()
    want = received.gather(2, columns)
    got = store.scores[:, :, : slots.used].double()  # type: ignore[union-attr, index]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_the_command(
    tmp_path: Path, micro_llama: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "micro", micro_llama, max_position_embeddings=96)
    text = write_text(tmp_path / "text.txt")
    given = [
        f"model.path={model}", "data=textfile", f"data.path={text}", "eviction.budget=24",
        "codec.block_size=4", "less.held=2",
    ]  # fmt: skip
    assert oracle.main(["--override", *given]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()][-2:]
    assert [row[0] for row in rows] == ["0", "1"]
    assert all(float(row[1]) > 0 and 30 < float(row[3]) <= 100 for row in rows)
