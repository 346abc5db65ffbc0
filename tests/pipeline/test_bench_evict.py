"""The bench of evicting layers times every candidate on the path that decoding takes."""

import json

import pytest
import torch

from kvsmith.eviction.policy import H2O
from kvsmith.pipeline import bench_evict
from kvsmith.pipeline.bench_decode import DIM, HEADS, KV_HEADS


def test_rows(tmp_path, capsys):
    out = tmp_path / "rows.json"
    given = ["--tokens", "160", "--budgets", "64", "--repeats", "1", "--out", str(out)]
    bench_evict.main(given)
    rows = json.loads(out.read_text())["rows"]
    assert [r["name"] for r in rows][:3] == [
        "DynamicCache",
        "lambda 64 none",
        "lambda 64 none state",
    ]
    assert len(rows) == 9 and rows[0]["over_dynamic"] == 1
    assert all(0 < r["least"] <= r["median"] <= r["most"] for r in rows)
    assert "h2o 64 nuq4 state" in capsys.readouterr().out


@pytest.mark.parametrize("codec", bench_evict.CODECS)
def test_a_step_keeps_to_the_budget_and_folds(codec):
    store = bench_evict.new_store(H2O(budget=64), codec, state=True)
    k, v = torch.randn(2, 1, KV_HEADS, 160, DIM).unbind(0)
    step = bench_evict.ours(store, k, v, torch.randn(1, HEADS, 1, DIM))
    for _ in range(bench_evict.BLOCK):
        step()
    assert store.kept().columns.shape[2] <= 64
    assert store.length == 160 + bench_evict.BLOCK
    assert store.state.log_z.isfinite().all()
