"""Every kernel compiles for every target, without spills and within shared memory."""

import json
import os
import subprocess
import sys

import pytest

from kvsmith.kernels.aot import TARGETS, Variant, cover, table
from tests.conftest import ROOT


def _run(*command):
    """A process of its own: what the interpreter runs cannot be compiled."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = [sys.executable, *(["-c"] if " " in command[0] else ["-m"]), *command]
    return subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_spills_and_shared_memory_are_read_from_the_binary():
    done = _run("tests.kernels.aot_samples", "sm_80", "gfx942")
    assert done.returncode == 0, done.stderr
    rows = {(r["name"], r["target"]): r for r in json.loads(done.stdout)}
    for target in TARGETS:
        row = rows["fine", target.name]
        assert not row["fault"] and 0 < row["registers"] < 64
    for target in ("sm_80", "gfx942"):
        row = rows["spills", target]
        assert row["fault"] == "spills" and row["spills"] > 0 and row["registers"] >= 64
    # 6 stages of two tiles of 128 x 128 halves; triton keeps one stage fewer than it is told.
    row = rows["shared", "sm_80"]
    assert row["fault"] == "shared memory" and 5 * 65536 <= row["shared"] <= 6 * 65536


def test_the_cover_has_every_kernel_for_every_target():
    variants = [Variant("op", str(i), "abc"[i % 3], {}) for i in range(40)]
    variants += [Variant("op", "h", "a", {}, backend="hip")]
    pairs = cover(variants)
    assert {(v.kernel, t.name) for v, t in pairs} == {(k, t.name) for k in "abc" for t in TARGETS}
    assert ("h", "gfx942") in [(v.name, t.name) for v, t in pairs]
    assert all(v.runs_on(t) for v, t in pairs)
    assert len({v.name for v, _ in pairs}) > 8 and len(pairs) < 30
    assert "registers" in table([])


@pytest.mark.slow
def test_a_covering_quarter_of_the_kernels_compiles(tmp_path):
    done = _run("kvsmith.kernels.bench", "--aot", "--quick", "--out", str(tmp_path / "aot.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "aot.json").read_text())
    assert {r["target"] for r in rows} == {t.name for t in TARGETS}
    assert not [r for r in rows if r["fault"]]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 2])
def test_decoding_takes_few_instructions(bits):
    """A thread's share of an element of K or V at Llama-3-8B's heads; each more costs 8 us a
    layer at 128K tokens on an H200.
    """
    done = _run(
        "from kvsmith.kernels.attend_encoded.triton import variants;"
        "from kvsmith.kernels.aot import TARGETS, compile_variant;"
        f"v = next(v for v in variants() if v.name == 'nuq {bits} bit, 4 x 128 bf16');"
        "t = next(t for t in TARGETS if t.name == 'sm_90');"
        "print(compile_variant(v, t).loop * 32 * v.num_warps / (v.constexprs['T'] * 256))"
    )
    assert done.returncode == 0, done.stderr
    assert 4 < float(done.stdout) < 7.5
