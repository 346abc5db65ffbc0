"""export.py on a micro model: calibration to bundle, names, repetition, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kvsmith
from kvsmith.bundle.manifest import CARD, MANIFEST, SHARD
from kvsmith.pipeline import calibrate, export
from kvsmith.pipeline.codecs import codec_names
from kvsmith.pipeline.config import load
from kvsmith.pipeline.export import ExportConfig
from tests.golden import contents
from tests.micro_model import write_model, write_text

ROOT = Path(__file__).resolve().parents[2]
PLAIN = ("int4_token", "int2_token_g32", "kivi2", "none")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, micro_llama: Callable[..., Any]) -> Path:
    """A folder with a model, and a calibration of it."""
    root = tmp_path_factory.mktemp("export")
    write_model(root / "micro", micro_llama, kv_heads=2, heads=4, head_dim=32)
    write_text(root / "text.txt")
    given = [f"model.path={root}/micro", "data=textfile", f"data.path={root}/text.txt"]
    given += ["samples=8", "length=64", f"folder={root}/calibration"]
    given += ["codecs=[kvquant_nuq3_o1]"]
    calibrate.run(load(calibrate.CalibrateConfig, "calibrate", given), root / "logs")
    return root


def exported(place: Path, *given: str) -> Path:
    paths = [f"model.path={place}/micro", f"calibrations={place}/calibration"]
    cfg = load(ExportConfig, "export", [*paths, f"bundles={place}/bundles", *given])
    return export.run(cfg, place / "logs")


def test_a_calibrated_codec_becomes_a_bundle(place: Path, micro_llama: Callable[..., Any]) -> None:
    from transformers import AutoModelForCausalLM

    path = exported(place, "codec=kvquant_nuq3_o1")
    assert re.fullmatch(r"kvquant_nuq3_o1-[0-9a-f]{8}", path.name)
    assert path.parent == place / "bundles" / "micro"
    assert contents(path).keys() == {MANIFEST, SHARD, CARD}
    bundle = kvsmith.load(path)
    assert bundle.manifest.base_model.id == "micro"
    calibration = bundle.manifest.calibration
    assert calibration is not None and (calibration.samples, calibration.length) == (8, 64)
    assert calibration.sensitivity == "fisher" and len(calibration.tokens_hash) == 64
    assert str(place) not in "".join(d.decode("latin-1") for d in contents(path).values())
    model = AutoModelForCausalLM.from_pretrained(place / "micro")
    prompt = torch.arange(3, 67)[None]
    cache = bundle.cache(model)
    tokens = model.generate(prompt, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] <= 68 and cache.nbytes() > 0
    with pytest.raises(ValueError, match="model_type|layer count|vocab_size|hidden_size"):
        bundle.cache(micro_llama(head_dim=32))


def test_the_parameters_are_those_of_the_calibration(place: Path) -> None:
    from kvsmith.pipeline.calibration import parameters_for

    bundle = kvsmith.load(exported(place, "codec=kvquant_nuq3_o1"))
    (folder,) = (place / "calibration" / "micro").iterdir()
    fitted = parameters_for(folder, bundle.spec.codec)
    assert fitted.keys() == bundle.parameters.keys()
    assert all(torch.equal(fitted[n], t) for n, t in bundle.parameters.items())


def test_the_same_again_changes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = exported(place, "codec=kvquant_nuq2_o1")  # fitted only now
    first = {p.name: p.stat().st_mtime_ns for p in path.iterdir()}
    said = capsys.readouterr().out
    assert f"written: {path}" in said and "bits at 32K" in said
    assert exported(place, "codec=kvquant_nuq2_o1") == path
    assert {p.name: p.stat().st_mtime_ns for p in path.iterdir()} == first
    assert f"unchanged: {path}" in capsys.readouterr().out
    elsewhere = exported(place, "codec=kvquant_nuq2_o1", f"bundles={place}/again")
    assert elsewhere.name == path.name and contents(elsewhere) == contents(path)


def test_a_damaged_bundle_is_exported_again(place: Path) -> None:
    path = exported(place, "codec=kvquant_nuq3_o1")
    whole = contents(path)
    (path / SHARD).write_bytes(whole[SHARD][:100])
    assert exported(place, "codec=kvquant_nuq3_o1") == path and contents(path) == whole


def test_the_name_tells_different_caches_apart(place: Path) -> None:
    base = exported(place, "codec=kivi2")
    paged = exported(place, "codec=kivi2", "page_size=64")
    changed = exported(place, "codec=int4_token", "codec.recent=48")
    assert len({base.name, paged.name, changed.name}) == 3
    assert changed.name.startswith("custom-") and paged.name.startswith("kivi2-")


@pytest.mark.parametrize("codec", PLAIN)
def test_codecs_without_parameters_need_no_calibration(codec: str, place: Path) -> None:
    path = exported(place, f"codec={codec}", f"calibrations={place}/nowhere")
    bundle = kvsmith.load(path)
    assert codec in codec_names() and path.name.startswith(f"{codec}-")
    assert bundle.manifest.calibration is None and not bundle.parameters


def test_measured_quality_goes_into_manifest_and_card(place: Path, tmp_path: Path) -> None:
    path = exported(place, "codec=kvquant_nuq3_o1")
    plain = contents(path)
    (tmp_path / "flat.json").write_text('{"perplexity": 7.25, "note": "x"}')
    given = ("codec=kvquant_nuq3_o1", f"quality={tmp_path}/flat.json")
    assert exported(place, *given) == path
    assert kvsmith.load(path).manifest.quality == {"perplexity": 7.25}
    assert "7.25" in kvsmith.load(path).card
    rows = [
        {"source": None, "fidelity": {"perplexity": 1.0}},
        {"source": f"x/{path.name}", "name": "n", "fidelity": {"perplexity": 2.5, "n": 3}},
    ]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    exported(place, "codec=kvquant_nuq3_o1", f"quality={tmp_path}/results.json")
    quality = kvsmith.load(path).manifest.quality
    assert quality == {"fidelity.perplexity": 2.5, "fidelity.n": 3.0}
    card = kvsmith.load(path).card
    assert "| perplexity | 2.5 |" in card and "fidelity.n" not in card  # the short form
    exported(place, "codec=kvquant_nuq3_o1")
    assert contents(path) == plain


def test_a_smoke_run_writes_into_its_own_folder(place: Path) -> None:
    given = [f"model.path={place}/micro", "codec=kivi2", "debug=smoke"]
    path = export.run(load(ExportConfig, "export", given), place / "smoke")
    assert path.parent == place / "smoke" / "bundles" / "micro"
    cfg = load(ExportConfig, "export", given[:-1])
    assert export.bundles_folder(cfg, place) == ROOT / "artifacts" / "bundles"


def refusal(place: Path, *given: str) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        exported(place, *given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_refused(place: Path, tmp_path: Path, micro_llama: Callable[..., Any]) -> None:
    missing = refusal(place, f"calibrations={tmp_path}")
    assert "calibrate.py model=micro" in missing and str(tmp_path) in missing
    assert "calibration.json" in refusal(place, f"calibration={tmp_path}")
    assert "existing folder" in refusal(place, f"model.path={tmp_path}/none")
    (folder,) = (place / "calibration" / "micro").iterdir()
    write_model(tmp_path / "other", micro_llama, kv_heads=1, heads=4, head_dim=32)
    other = refusal(place, f"model.path={tmp_path}/other", f"calibration={folder}")
    assert "kv_heads (layer 0) must be 2, got 1" in other
    assert "quality" in refusal(place, "codec=kivi2", f"quality={tmp_path}/none.json")
    (tmp_path / "rows.json").write_text('{"rows": []}')
    assert "evaluate.py" in refusal(place, "codec=kivi2", f"quality={tmp_path}/rows.json")
    (tmp_path / "list.json").write_text('["a"]')
    assert "numbers by name" in refusal(place, "codec=kivi2", f"quality={tmp_path}/list.json")
    assert "page_size" in refusal(place, "codec=kivi2", "page_size=48")
    assert "Did you mean kivi" in refusal(place, "codec=kivi3")
    assert "page_size" in refusal(place, "pagesize=64")


def test_the_parameters_of_other_weights_are_not_taken(
    place: Path, tmp_path: Path, micro_llama: Callable[..., Any]
) -> None:
    write_model(tmp_path / "micro", micro_llama, kv_heads=2, heads=4, head_dim=32, seed=1)
    assert "other weights" in refusal(place, f"model.path={tmp_path}/micro")


@pytest.mark.slow
def test_the_script_runs_and_ends_in_one_line_where_it_cannot(place: Path) -> None:
    command = [sys.executable, "export.py", f"model.path={place}/micro", f"bundles={place}/script"]
    command += [f"hydra.run.dir={place}/logs", "codec=kivi2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = (place / "script" / "micro").iterdir()
    assert done.stdout.splitlines()[-1] == f"written: {path}"
    assert kvsmith.load(path).parameters == {}
    command += ["model.path=nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr


def test_the_calibration_with_the_sinks_of_the_codec_is_taken(place: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place / "calibration", tmp_path / "calibration"))
    given = [f"model.path={place}/micro", "data=textfile", f"data.path={place}/text.txt"]
    given += ["samples=8", "length=64", f"folder={folder}", "codecs=[]", "sinks=0"]
    newer = calibrate.run(load(calibrate.CalibrateConfig, "calibrate", given), tmp_path / "logs")
    (older,) = (p.parent for p in folder.glob("micro/*/calibration.json") if p.parent != newer)
    codec = ["codec=kvquant_nuq3_o1", f"calibrations={folder}", f"bundles={tmp_path}/bundles"]
    for sinks, used in ((4, older), (0, newer)):
        exported(place, *codec, f"codec.sinks={sinks}")
        assert len([*(used / "parameters").glob("*/*.safetensors")]) >= 2
    with pytest.raises(FileNotFoundError, match=r"got 2 of other.*model=micro sinks=2`"):
        exported(place, *codec, "codec.sinks=2")
