"""Rotations from queries and outputs: orthogonal, from the right covariance, exported once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import kvsmith
from kvsmith.codec import hadamard
from kvsmith.pipeline import calibrate, export
from kvsmith.pipeline.calibration import parameters_for
from kvsmith.pipeline.calibration.bases import collect_bases
from kvsmith.pipeline.codecs import load_codec
from kvsmith.pipeline.config import load
from kvsmith.pipeline.log import Run
from tests.micro_model import write_model, write_text


def test_rotations_diagonalise_what_queries_and_outputs_are(
    micro_llama: Callable[..., Any],
) -> None:
    model, tokens = micro_llama(layers=2), torch.randint(3, 97, (3, 40))
    first = model.model.layers[0].self_attn
    with Run(None, quiet=True) as log:
        found = collect_bases(model, tokens, 3, log)
        again = collect_bases(model, tokens, 2, log)
    assert model.config._attn_implementation == "sdpa"
    assert set(found) == {f"layers.{i}.{n}.rotation" for i in (0, 1) for n in "kv"}
    heads, dim = found["layers.0.v.rotation"].shape[:2]
    for name, turn in found.items():
        one = torch.eye(dim).expand(heads, dim, dim)
        torch.testing.assert_close(turn @ turn.mT, one, atol=1e-5, rtol=0)
        # Batches only change the order of float64 sums; eigenvectors lie this close together.
        torch.testing.assert_close(turn, again[name], atol=1e-3, rtol=0)
    outputs = []
    hook = first.o_proj.register_forward_pre_hook(lambda _m, args: outputs.append(args[0]))
    model(tokens, past_key_values=DynamicCache(config=model.config))
    hook.remove()
    rows = outputs[0].double().unflatten(-1, (heads, -1, dim)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    total = torch.einsum("bhtd,bhte->hde", rows, rows)
    turn = found["layers.0.v.rotation"].double() @ hadamard(dim).double()
    inside = turn.mT @ total @ turn
    off = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-5 * inside.abs().max()


def test_export_takes_rotations_from_the_calibration(
    tmp_path: Path, micro_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [f"model.path={write_model(tmp_path / 'micro', micro_llama, head_dim=32)}"]
    given += ["data=textfile", f"data.path={write_text(tmp_path / 'text.txt')}"]
    given += ["data.piece_chars=300"]
    own = ["samples=8", "length=64", "codecs=[]", f"folder={tmp_path}/calibration"]
    calibrate.run(load(calibrate.CalibrateConfig, "calibrate", [*given, *own]), tmp_path / "logs")
    given += ["codec=eig_nf3"]
    given += [f"calibrations={tmp_path}/calibration", f"bundles={tmp_path}/bundles"]
    path = export.run(load(export.ExportConfig, "export", given), tmp_path / "logs")
    bundle = kvsmith.load(path)
    assert set(bundle.parameters) == {f"layers.{i}.{n}.rotation" for i in (0, 1) for n in "kv"}
    assert bundle.manifest.calibration is not None
    model = micro_llama(vocab=257, head_dim=32)
    logits = model(torch.arange(3, 120)[None], past_key_values=bundle.cache(model)).logits
    assert bool(logits.isfinite().all())

    def refuse(*_: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("kvsmith.pipeline.calibration.bases.collect_bases", refuse)
    assert export.run(load(export.ExportConfig, "export", given), tmp_path / "logs") == path
    folder = next((tmp_path / "calibration" / "micro").iterdir())
    with pytest.raises(ValueError, match="got rotations. Run `python export.py codec=eig_nf3`"):
        parameters_for(folder, load_codec("eig_nf3"))
    fitted = [*given[:-2], *own]
    calibrate.run(load(calibrate.CalibrateConfig, "calibrate", fitted), tmp_path / "logs")
