"""What of the kernel benchmark can be tested without a GPU."""

import json
import time
from dataclasses import replace

import pytest
import torch

from kvsmith.kernels import bench, bench_attend, bench_ops, bench_time
from kvsmith.kernels.bench_ops import Shape

CPU = torch.device("cpu")
SMALL = Shape("llama-3-8b", 4, 2, 32, 1, 32)


def test_percentiles():
    found = bench_time.spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (found.p20, found.p50, found.p80, found.n) == (2.0, 3.5, 5.0, 6)


def test_a_call_is_timed_by_itself():
    """Three calls that sleep 2 ms take 2 ms each."""
    seen = []
    calls = [lambda i=i: (seen.append(i), time.sleep(0.002)) for i in range(3)]
    found = bench_time.time_calls(calls, CPU, 0.01)
    assert 0.002 <= found.p20 <= found.p50 <= found.p80 and found.p20 < 0.02
    assert found.n >= 5 and len(seen) == 3 * (found.n + 1) and seen[:6] == [0, 1, 2, 0, 1, 2]


def test_inputs_outgrow_the_cache():
    assert [bench_time.copies_beyond_cache(n << 20) for n in (0, 1, 100, 512, 4096)] == [
        64,
        64,
        6,
        1,
        1,
    ]


def test_the_best_of_torch_s_attention_skips_what_refuses():
    q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 8, 16)
    name, found = bench_time.best_sdpa([(q, k, k)], None, 0.0)
    assert name in ("flash", "math") and found.p50 > 0


def test_bandwidth_and_environment():
    assert bench_time.copy_bandwidth(CPU, 1 << 20, 0.0) > 1e6
    found = bench_time.environment(CPU)
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert json.dumps(found)


def test_shapes_cover_models_batches_and_lengths_that_fit():
    every = list(bench_ops.shapes(False, 10**15))
    assert len(every) == 3 * 3 * 4 and {s.tokens >> 10 for s in every} == {32, 128, 512, 1024}
    # H200: 128K tokens of Llama-3-8B's heads are 0.5 GiB a layer; 32 rows of 1M tokens are 128 GiB.
    fits = list(bench_ops.shapes(False, 139 << 30))
    assert max(s.dense_bytes for s in fits) <= (139 << 30) // 3 and len(fits) < len(every)
    assert Shape("llama-3-8b", 32, 8, 128, 1, 128 << 10).dense_bytes == 1 << 29
    assert [s.tokens >> 10 for s in bench_ops.shapes(True, 10**15)] == [32, 128]


def test_an_op_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setitem(bench.CHECKS, "encode_pack", lambda device: "codes differ")
    monkeypatch.setitem(bench.CHECKS, "column_scores", lambda device: "")
    monkeypatch.setitem(bench.CHECKS, "attend_encoded", lambda device: "wrong")
    rows, left_out = bench.run_ops([SMALL], CPU, 0.0, time.monotonic() + 60, 1e9)
    assert {r["op"] for r in rows} == {"column_scores"}
    assert left_out == [
        "attend_encoded is not timed: wrong",
        "encode_pack is not timed: codes differ",
    ]
    text = bench.table([json.loads(json.dumps(r)) for r in rows])
    assert "column_scores" in text and "llama-3-8b B=1" in text
    row = rows[0]
    assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["time"]["p50"] / 1e9)
    assert bench.run_ops([SMALL], CPU, 0.0, time.monotonic() - 1, 1e9)[1][2].endswith(
        "no time left"
    )


def test_attention_is_checked_and_timed_beside_the_dense_one(monkeypatch):
    monkeypatch.setattr(bench_attend, "copies_beyond_cache", lambda nbytes: 2)
    assert bench_attend.check_attend(CPU) == ""
    row = next(bench_attend.attend_rows(replace(SMALL, tokens=64, batch=2), CPU, 0.0))
    assert (row["op"], row["bits"]) == ("attend 1%", 4) and row["dense"] in ("flash", "math")
    assert row["speedup"] == row["dense_p50"] / row["time"].p50
    rows, _ = bench.run_ops([], CPU, 0.0, time.monotonic() + 60, 1e9)
    assert rows == []
    done = bench.finished(row, SMALL, 1e9)
    assert bench.table([done]).splitlines()[1].split()[-1] == f"{row['speedup']:.2f}"
    # 32 of 64 tokens stay dense; 16 are encoded in 2 heads of 32, 4 bits and outliers.
    assert 0 < row["bytes"] < 4 * 2 * 2 * 32 * 64


def test_rows_of_encoding(monkeypatch):
    monkeypatch.setattr(bench_ops, "copies_beyond_cache", lambda nbytes: 2)
    rows = list(bench_ops.encode_rows(SMALL, CPU, 0.0))
    assert [(r["op"][-1], r["bits"]) for r in rows] == [("k", 4), ("v", 4), ("k", 2), ("v", 2)]
    # 32 tokens of 64 channels: 4096 bytes in, half a byte an element and the outliers out.
    assert 4096 + 1024 < rows[0]["bytes"] < 4096 + 1024 + 32 * 8


@pytest.mark.parametrize("op", ["encode_pack", "column_scores"])
def test_the_checks_see_a_wrong_result(op, monkeypatch):
    assert bench.CHECKS[op](CPU) == ""
    wrong = getattr(bench_ops, op)

    def spoiled(*args, impl=None, **kwargs):
        result = wrong(*args, impl=impl, **kwargs)
        if impl == "triton":
            part = result["codes"] if op == "encode_pack" else result
            part += 1
        return result

    monkeypatch.setattr(bench_ops, op, spoiled)
    assert "reference" in bench.CHECKS[op](CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("arguments", [[], ["--quick"], ["--fill"], ["--end-to-end"]])
def test_without_a_gpu_one_line_and_exit_code_2(arguments, capsys):
    assert bench.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "kvsmith.kernels.bench: a GPU is needed; --aot runs without one\n"
    with pytest.raises(SystemExit):
        bench.main(["--fast"])
