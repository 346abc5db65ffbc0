"""plan.py: every shape and device by name, what it says, and what it leaves."""

import json

import pytest

from kvsmith.hf.shapes import SHAPES
from kvsmith.pipeline.codecs import codec_names
from kvsmith.pipeline.config import load, main_guard
from kvsmith.pipeline.plan import PlanConfig, by_size, model_config, plan_of, run, verdicts
from kvsmith.pipeline.report.capacity import merged
from tests.micro_model import write_model


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_an_option_of_the_model_group(shape):
    cfg = load(PlanConfig, "plan", [f"model={shape}"])
    assert model_config(cfg.model).num_hidden_layers > 1  # no download


def test_a_plan_of_every_preset_is_written_and_said(tmp_path, capsys):
    options = ["model=llama3-8b", "device=h200", "context=10M", "factor=2"]
    plan = run(load(PlanConfig, "plan", options), tmp_path)
    said = capsys.readouterr().out
    assert "nuq2_o1: 10,000,000 tokens fit one h200" in said and "beyond the 8,192" in said
    assert said.count("beyond the 8,192") == 1
    found = json.loads((tmp_path / "plan.json").read_text())
    assert {o["codec"] for o in found["options"]} == set(codec_names())
    used = found["weights"] + found["activations"] + found["reserve"] + found["room"]
    assert used == found["device"]["memory"]
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert [o.cache for o in by_size(plan.options)] == sorted(o.cache for o in plan.options)
    names = [n for names, _ in merged(plan.options) for n in names]
    assert sorted(names) == codec_names()


def test_a_folder_is_planned_as_it_is(tmp_path, micro_llama):
    folder = write_model(tmp_path / "m", micro_llama)
    overrides = [f"model.path={folder}", "device=t4", "codecs=[int4_token,none]", "batch=2"]
    plan = plan_of(load(PlanConfig, "plan", overrides))
    assert [o.codec for o in plan.options] == ["int4_token", "none"]
    assert len(verdicts(plan)) == 1 and "2 x 128,000 tokens fit one t4" in verdicts(plan)[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("device=h20", "device: value must be one of a10g, "),
        ("context=long", "context: value must be a number of tokens"),
        ("factor=0", "factor: value must be between 1 and 6"),
        ("codecs=[nuq9]", "codecs: codec must be one of "),
        ("reserve=2.0", "reserve: share of memory must be in"),
        ("model=llama4", "model: value must be one of "),
    ],
)
def test_mistakes_are_one_line(override, message, tmp_path, capsys):
    assert main_guard(lambda: run(load(PlanConfig, "plan", [override]), tmp_path)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
