"""The adapter for lm-evaluation-harness on a local task; runs where the harness is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvsmith.bundle import Bundle, base_model
from kvsmith.hf import geometry
from kvsmith.spec import CacheSpec, CodecSpec, TensorCodec, Uniform
from tests.micro_model import write_model

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="pip install lm_eval"),
    pytest.mark.filterwarnings("default"),  # the harness's own
]

TASK = """
task: local
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["{{a}}", "{{b}}"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""
WORDS = "apple bread copper delta ember flint grove harbor island jungle"


def _bundle(model: Any, bits: int, folder: Path) -> str:
    base = base_model(model.config.to_dict(), geometry(model.config), "micro")
    side = TensorCodec(Uniform(bits=bits))
    spec = CacheSpec(CodecSpec(side, side, sinks=0, recent=0))
    return str(Bundle.create(spec, {}, base).save_pretrained(folder))


def test_a_local_task_is_scored_through_the_cache(
    tmp_path: Path, micro_llama: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from kvsmith.pipeline.harness import CompressedLM, main

    folder = write_model(tmp_path / "m", micro_llama)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    bundles = [_bundle(model, bits, tmp_path / f"b{bits}") for bits in (8, 1)]
    lines = [
        json.dumps({"text": f"{WORDS} {i} {WORDS}", "a": f" bread {i}", "b": f" copper {i}"})
        for i in range(6)
    ]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    task = TASK.replace("FILE", str(tmp_path / "docs.jsonl"))
    (tmp_path / "local.yaml").write_text(task)

    options = {"pretrained": str(folder), "batch_size": 2, "device": "cpu"}
    ids = torch.randint(3, 97, (1, 100))
    plain = CompressedLM(**options)._model_call(ids)
    assert torch.allclose(plain, model(ids).logits, atol=1e-4)  # chunks alone change nothing
    near, far = (CompressedLM(bundle=b, **options)._model_call(ids) for b in bundles)
    assert 0 < (near - plain).abs().mean() < 0.2 * (far - plain).abs().mean()

    words = ["--model", str(folder), "--bundle", *bundles, "--tasks", "local", "--device", "cpu"]
    main([*words, "--include", str(tmp_path), "--output", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) == {"full precision", *bundles}
    assert all(0 <= f["local"]["acc,none"] <= 1 for f in found.values())
    assert "acc_stderr" in capsys.readouterr().out
