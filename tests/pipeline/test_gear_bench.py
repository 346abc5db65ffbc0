"""The bench of GEAR's parts, on little."""

import pytest
import torch

from kvsmith.hf import make_cache
from kvsmith.pipeline.codecs import load_codec
from kvsmith.pipeline.gear import error, frontier, generation, times
from kvsmith.pipeline.log import Run
from kvsmith.spec import CacheSpec


@pytest.fixture
def log():
    with Run(None) as run:
        yield run


def test_parts_off_and_on():
    x = torch.randn(1, 2, 128, 64).pow(3)
    found = {n: error.measure(x, s.k, 64) for n, s in error.ways(load_codec("gear2")).items()}
    sizes, left = ({n: f[i] for n, f in found.items()} for i in (0, 1))
    assert left["Q + S + L"] < min(left["Q + S"], left["Q + L"]) < left["Q"]
    # Two columns of 64 + 64 float16 for 64 x 64 elements are one bit.
    assert sizes["Q + L"] == sizes["Q"] + 1 and sizes["Q"] == 2.5


def test_a_bit_of_code_is_worth_about_one():
    worth = list(frontier._worth(torch.randn(1, 2, 128, 64), 4, 64, 0))
    assert len(worth) == len(frontier.PARTS) and worth[0] == pytest.approx(1.05, abs=0.05)
    assert all(0 < w < worth[0] for w in worth[1:])


def test_times_are_told(log, capsys):
    times.encode(log, repeats=1)
    times.decode(log, tokens=256, repeats=1)
    said = capsys.readouterr().out
    assert said.count("Q + S + L") == 8 and "gear_q2" in said


def test_generation_in_a_process_of_its_own(micro_llama):
    model, ids = micro_llama(layers=1, head_dim=64), torch.randint(3, 97, (2, 70))
    spec = CacheSpec(load_codec("gear2"))

    def make():
        return make_cache(model, spec)

    got = generation._apart(lambda: generation._generated(model, make, ids, 4))
    cache = make()
    generation._run(model, cache, ids, 4)
    assert got.nbytes == cache.nbytes() and got.rate > 0 and got.prefill > 0
    taken = generation._profiled(model, spec.codec, ids, 4)
    whole = taken.pop("all")
    assert sum(taken.values()) == pytest.approx(whole) and taken["factors: found"] > 0
