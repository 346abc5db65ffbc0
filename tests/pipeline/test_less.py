"""Training of LESS states: the replay is decoding, and runs repeat to the byte."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvsmith.eviction.policy import H2O, TOVA, Lambda
from kvsmith.hf import make_cache
from kvsmith.less.features import feature_map
from kvsmith.less.spec import MLP, Exponential, Less
from kvsmith.pipeline.config import load
from kvsmith.pipeline.data import TextfileData
from kvsmith.pipeline.evaluation.candidate import Candidate
from kvsmith.pipeline.evaluation.recovery import controls, widened
from kvsmith.pipeline.export import ExportConfig, make_bundle
from kvsmith.pipeline.less.allot import allot_ranks
from kvsmith.pipeline.less.layers import initial, relative_error
from kvsmith.pipeline.less.options import (
    H2OChoice,
    LambdaChoice,
    LessTraining,
    TOVAChoice,
    resolve,
)
from kvsmith.pipeline.less.parallel import Pick, attend_state
from kvsmith.pipeline.less.record import Layer, replay, sweep
from kvsmith.pipeline.less.result import RECORD, read_trained
from kvsmith.pipeline.less.run import train_less
from kvsmith.pipeline.less.training import projections
from kvsmith.pipeline.log import NoLogger, Run
from kvsmith.pipeline.model import ModelConfig
from kvsmith.pipeline.train import TrainConfig
from kvsmith.spec import CacheSpec, CodecSpec, Identity, TensorCodec, Uniform
from kvsmith.stores import make_store
from tests.micro_model import write_model, write_text
from tests.processes import errors, together
from tests.runtime.models import build

IDENTITY = TensorCodec(Identity())
CODEC = CodecSpec(IDENTITY, IDENTITY, sinks=1, recent=4, block_size=4)
POLICIES = [Lambda(24), H2O(24), H2O(24, aging=1.0), TOVA(24)]
FEATURES = [Exponential(), MLP(16)]


def activations(model: Any, ids: torch.Tensor) -> list[Layer]:
    """Every layer's, of one sweep."""
    seen: list[Layer] = []
    sweep(model, ids, seen.append)
    return seen


OTHERS = ["llama-mqa", "llama-mha", "gpt2", "falcon-rope", "falcon-alibi-mqa"]
EVERY = [
    *itertools.product(["llama"], POLICIES, FEATURES),
    *itertools.product(OTHERS, POLICIES, FEATURES[:1]),
]


@pytest.mark.parametrize(
    ("family", "policy", "features"), EVERY, ids=lambda x: getattr(x, "kind", x)
)
def test_the_parallel_form_is_decoding_token_by_token(
    family: str, policy: Any, features: Any
) -> None:
    """One layer sees the same inputs in both, so its outputs must agree, with the state."""
    model = build(family, layers=1)
    ids = torch.randint(3, 97, (2, 61))
    (seen,) = activations(model, ids)
    spec = CacheSpec(CODEC, policy, page_size=16)
    shape = make_cache(model, spec).geometry
    gone = replay(seen, make_store(spec, shape, 0, {}))  # type: ignore[arg-type]
    assert gone is not None and gone.first == 24 and gone.k.shape[2] == 36
    cfg = LessTraining(features, rank=3, trained_ranks=(3,))
    own = initial(cfg, 0, shape.layers[0], seen, gone, projections(model)[0])
    if isinstance(features, MLP):
        own["psi.s1"] += 0.5
    maps = feature_map(features, own)
    got = gone.kept.merge(attend_state(maps, 3, seen.q[:, :, 24:60], gone)).out
    some = Pick(1, 4)
    part = attend_state(maps, 3, seen.q[:, :, 24:60], gone, some)
    torch.testing.assert_close(
        gone.kept.merge(attend_state(maps, 3, seen.q[:, :, 24:60], gone))
        .out.unflatten(2, (-1, 4))[:, :, 1::4]
        .flatten(2, 3),
        replace(gone.kept, out=some.rows(gone.kept.out, 4), lse=some.rows(gone.kept.lse, 4))
        .merge(part)
        .out,
    )
    # Decode the same tokens one by one and take what the attention module hands to its projection.
    full = replace(spec, less=Less(features, rank=3, store_dtype="float32"))
    cache = make_cache(model, full, {f"layers.0.less.{n}": t for n, t in own.items()})
    outs: list[torch.Tensor] = []
    weight_owner = next(
        m
        for n, m in model.named_modules()
        if n.endswith(("o_proj", "attn.c_proj", "attention.dense"))
    )
    hook = weight_owner.register_forward_pre_hook(lambda _, args: outs.append(args[0]))
    with torch.no_grad():
        for token in ids[:, :60].split(1, dim=1):
            model(token, past_key_values=cache, use_cache=True)
    hook.remove()
    want = torch.cat(outs, 1)[:, 24:].unflatten(-1, (shape.layers[0].query_heads, -1))
    torch.testing.assert_close(got, want.transpose(1, 2), rtol=0, atol=2e-5)


def test_a_sweep_changes_nothing_and_shows_full_attention() -> None:
    model = build("llama")
    ids = torch.randint(3, 97, (1, 30))
    with torch.no_grad():
        before = model(ids).logits
    seen = activations(model, ids)
    assert [s.index for s in seen] == [0, 1]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("features", FEATURES, ids=lambda f: f.kind)
def test_the_first_features_do_no_harm(features: Any) -> None:
    model = build("llama", layers=1)
    (seen,) = activations(model, torch.randint(3, 97, (2, 80)))
    spec = CacheSpec(CODEC, H2O(24))
    shape = make_cache(model, spec).geometry
    gone = replay(seen, make_store(spec, shape, 0, {}))  # type: ignore[arg-type]
    assert gone is not None
    weight = projections(model)[0]
    cfg = LessTraining(features, rank=4, trained_ranks=(2, 4))
    maps = feature_map(features, initial(cfg, 0, shape.layers[0], seen, gone, weight))
    assert relative_error(maps, 4, seen, gone, weight, Pick()).item() < 1.05


@pytest.fixture
def world(tmp_path: Path, micro_llama: Callable[..., Any]) -> tuple[ModelConfig, TextfileData]:
    folder = write_model(tmp_path / "micro", micro_llama, max_position_embeddings=96)
    return ModelConfig(str(folder)), TextfileData(path=str(write_text(tmp_path / "text.txt")))


SMALL = LessTraining(
    rank=4, trained_ranks=(2, 4), samples=4, batch_size=2, steps=4, stride=2, held=2, lr=0.05
)


def trained(
    world: tuple[ModelConfig, TextfileData], tmp_path: Path, cfg: LessTraining = SMALL, **more: Any
) -> Path:
    model, data = world
    codec, choice = more.get("codec", CODEC), more.get("choice", H2OChoice(budget=0.25))
    folder = train_less(
        cfg, model, data, codec, choice, tmp_path / "out", tmp_path / "work", NoLogger()
    )
    assert folder is not None
    return folder


def test_training_exporting_and_decoding(
    world: tuple[ModelConfig, TextfileData], tmp_path: Path
) -> None:
    cfg = replace(SMALL, steps=12, allot=True, budgets=(1.0, 1.5))
    folder = trained(world, tmp_path, cfg)
    record, tensors = read_trained(folder)
    assert record.source.cache.eviction == H2O(24) and record.source.length == 96
    assert all(by["4"] < 1.0 for by in record.left.values())  # better than eviction alone
    again = trained(world, tmp_path, cfg)  # finished: nothing to do
    assert again == folder
    export = ExportConfig(
        world[0], CODEC, H2OChoice(budget=24), cfg, trainings=str(tmp_path / "none"),
        trained=str(folder),
    )  # fmt: skip
    bundle, name = make_bundle(export, Run(None))
    assert name.split("-")[:3] == ["none", "h2o24", "less4"]
    assert bundle.spec.less is not None and bundle.spec.less.ranks == record.ranks
    path = bundle.save_pretrained(tmp_path / "bundle")
    import kvsmith
    from kvsmith.pipeline.model import load_model

    loaded = kvsmith.load(path)
    assert loaded.spec == bundle.spec and loaded.manifest == bundle.manifest
    model, _ = load_model(world[0])
    ids = torch.randint(0, 200, (1, 60))
    out = model.generate(
        ids, past_key_values=loaded.cache(model), max_new_tokens=10, do_sample=False
    )
    assert out.shape[1] <= 70
    found = controls([Candidate(name, "bundle", "x", loaded.spec, loaded.parameters)])
    assert [c.spec.eviction.budget for c in found if c.spec] == [24, 28]  # type: ignore[union-attr]
    assert all(c.spec is not None and c.spec.less is None for c in found)
    assert widened(loaded.spec).eviction == H2O(28, recent=14)
    missing = {n: t for n, t in tensors.items() if ".1." not in n}
    from kvsmith.pipeline.less.result import cut

    with pytest.raises(ValueError, match=r"layers\.1\.less\.phi\.weight: feature must be trained"):
        cut(loaded.spec, loaded.manifest.base_model, missing)
    wide = replace(loaded.spec, less=Less(rank=8))
    with pytest.raises(ValueError, match=r"less\.rank: shape of layers\.0.* must be at most"):
        cut(wide, loaded.manifest.base_model, tensors)


def test_a_quantized_body_trains(world: tuple[ModelConfig, TextfileData], tmp_path: Path) -> None:
    part = TensorCodec(Uniform(bits=4))
    plain = read_trained(trained(world, tmp_path))[1]
    rough = read_trained(trained(world, tmp_path, codec=replace(CODEC, k=part, v=part)))[1]
    name = "layers.0.less.psi.weight"
    assert not torch.equal(plain[name], rough[name])


class _Killed(Exception):
    pass


def test_an_interrupted_run_ends_in_the_same_bytes(
    world: tuple[ModelConfig, TextfileData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvsmith.pipeline.less.training import Training

    whole = trained(world, tmp_path / "a")
    original = Training._batch
    calls = []

    def once(self: Training, number: int, ids: torch.Tensor) -> dict[int, float]:
        calls.append(number)
        if number == 1 and calls.count(1) == 1:
            raise _Killed
        return original(self, number, ids)

    monkeypatch.setattr(Training, "_batch", once)
    with pytest.raises(_Killed):
        trained(world, tmp_path / "b")
    resumed = trained(world, tmp_path / "b")
    assert calls == [0, 1, 1]
    for name in ("less.safetensors", RECORD):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()


def test_two_processes_find_what_one_finds(
    world: tuple[ModelConfig, TextfileData], tmp_path: Path
) -> None:
    """Layers are spread, then the sequences of each batch."""
    one = read_trained(trained(world, tmp_path, replace(SMALL, joint_steps=2)))[1]
    options = "{rank: 4, trained_ranks: [2, 4], samples: 4, batch_size: 2, steps: 4, stride: 2, "
    options += "held: 2, lr: 0.05, joint_steps: 2}"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
        "train.py", f"model.path={world[0].path}", "data=textfile",
        f"data.path={world[1].path}", "eviction=h2o_pct5", "eviction.budget=0.25",
        f"+less={options}", "codec.sinks=1", "codec.recent=4", "codec.block_size=4",
        f"output={tmp_path / 'two'}", f"work={tmp_path / 'w2'}", f"hydra.run.dir={tmp_path / 'h'}",
    ]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = (tmp_path / "two").iterdir()
    two = read_trained(folder)[1]
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6)


def test_a_killed_process_ends_the_training_and_any_number_continues(
    world: tuple[ModelConfig, TextfileData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvsmith.pipeline import ranks
    from kvsmith.pipeline.less.training import Training

    monkeypatch.setattr(ranks, "GRACE", 0.5)
    cfg = replace(SMALL, samples=6)
    whole = trained(world, tmp_path / "whole", cfg)
    work = tmp_path / "killed"

    def alike() -> None:
        model, data = world
        train_less(
            cfg, model, data, CODEC, H2OChoice(0.25), work / "out", work / "work", NoLogger()
        )

    def doomed() -> None:
        save, saves = Training._save, iter(range(9))

        def dies(self: Training) -> None:
            save(self)
            if next(saves) == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        Training._save = dies  # type: ignore[method-assign]
        alike()

    first, second = together(work, alike, doomed)
    assert second[0] == -signal.SIGKILL and first[0] == 1, first[1]
    assert len(errors(first[1])) == 1 and "Start the same command again" in first[1]
    found = together(work, alike, alike, alike)  # one more than there are layers
    assert {code for code, _ in found} == {0}, found
    assert "written: " in found[0][1] and not found[1][1] + found[2][1], "only the first speaks"
    (folder,) = (work / "out").iterdir()
    for name in ("less.safetensors", RECORD):
        assert (whole / name).read_bytes() == (folder / name).read_bytes()


def test_bad_inputs_are_one_line(world: tuple[ModelConfig, TextfileData], tmp_path: Path) -> None:
    from kvsmith.eviction.policy import KeepAll

    cases: list[tuple[dict[str, Any], LessTraining, str]] = [
        ({"choice": KeepAll()}, SMALL, "less: eviction must be one that evicts, got keep_all"),
        ({"choice": H2OChoice(budget=96)}, SMALL, "whole tokens below context 96, got 96"),
        ({"choice": H2OChoice(budget=10)}, SMALL, "at least sinks \\+ recent \\+ 2 blocks"),
        ({}, replace(SMALL, length=200), "less.length: .* at most the model's context of 96"),
        ({}, replace(SMALL, length=24), "less.length: .* more than the budget of 24 and a block"),
        (
            {},
            replace(SMALL, lr=1e30),
            "less: layer 0: error left .* must be below 1.5, .* Lower less.lr",
        ),
    ]
    for more, cfg, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            trained(world, tmp_path, cfg, **more)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"less\.rank: value must be one of trained_ranks \[8\]"):
        LessTraining(rank=4)


def test_a_dry_run_does_the_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    """A 7B model: below an hour, features below a thousandth of the weights, weights once."""
    from transformers import LlamaConfig

    from kvsmith.hf.shapes import model_facts
    from kvsmith.pipeline.less.estimate import estimate

    facts = model_facts("llama2-7b", LlamaConfig(max_position_embeddings=4096))
    spec = CacheSpec(replace(CODEC, block_size=8), H2O(205))
    said = estimate(facts, spec, LessTraining(samples=512), 4096)
    minutes = int(next(x for x in said if "minutes" in x).split("about ")[1].split()[0])
    assert 5 < minutes < 60
    assert "0 steps" in said[4] and "0.03" in said[6]  # percent
    assert "12.6 GiB of 16-bit weights" in said[7]


def test_budgets_as_shares() -> None:
    assert resolve(LambdaChoice(budget=0.05), 1024) == Lambda(51)
    assert resolve(TOVAChoice(budget=512), None) == TOVA(512)
    with pytest.raises(ValueError, match="a share above 0 of a context"):
        resolve(H2OChoice(budget=0.1), None)
    with pytest.raises(ValueError, match="whole tokens"):
        resolve(H2OChoice(budget=10.5), 100)


def test_ranks_go_where_they_save_most() -> None:
    left = {0: {2: 0.9, 4: 0.5, 8: 0.4}, 3: {2: 0.5, 4: 0.49, 8: 0.1}}
    same = {0: 1.0, 3: 1.0}
    assert allot_ranks(left, {0: 1.0, 3: 0.01}, same, 3) == (4, 2)
    assert allot_ranks(left, {0: 0.01, 3: 1.0}, same, 5) == (2, 8)
    assert allot_ranks(left, {0: 1.0, 3: 1.0}, same, 2) == (2, 2)  # no byte to spare
    worse = {0: {2: 0.5, 4: 0.6}}
    assert allot_ranks(worse, {0: 1.0}, {0: 1.0}, 4) == (2,)  # more features that do not help


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "conf/less").glob("*.yaml")))
def test_every_training_composes(path: Path) -> None:
    if path.stem != "base":
        cfg = load(TrainConfig, "train", [f"less={path.stem}"])
        assert cfg.less is not None and cfg.eviction.kind in path.stem + "h2o"
        assert load(ExportConfig, "export", [f"less={path.stem}"]).less == cfg.less


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "conf/eviction").glob("*.yaml"))
)
def test_every_eviction_composes(path: Path) -> None:
    cfg = load(ExportConfig, "export", [f"eviction={path.stem}"])
    assert path.stem == "none" or cfg.eviction.kind == path.stem.split("_")[0]
