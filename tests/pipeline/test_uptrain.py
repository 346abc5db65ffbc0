"""Conversion to shared layers and training towards the original."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvsmith.cla import Groups, Map
from kvsmith.hf import share
from kvsmith.pipeline.config import load
from kvsmith.pipeline.data import TextfileData
from kvsmith.pipeline.log import NoLogger
from kvsmith.pipeline.model import ModelConfig, load_model
from kvsmith.pipeline.report import sharing
from kvsmith.pipeline.train import TrainConfig, run
from kvsmith.pipeline.training import loop
from kvsmith.pipeline.training.convert import convert
from kvsmith.pipeline.training.distill import Mix, distillation
from kvsmith.pipeline.training.fits import as_pairs, fit_pair, observe
from kvsmith.pipeline.training.joint import fit_group
from kvsmith.pipeline.training.owner_map import Measured, Tie, choose_map, measure_ties
from kvsmith.pipeline.training.plan import Optim, Phase
from kvsmith.pipeline.training.uptrain import Uptrain, uptrain
from tests.micro_model import write_model, write_text
from tests.runtime.models import build

OPTIM = Optim(
    tokens=512,
    batch_tokens=64,
    phases=(Phase(1.0, 32),),
    lr=3e-3,
    warmup_steps=1,
    weight_decay=0.0,
    precision="float32",
    compile=False,
    checkpoint_steps=3,
    eval_steps=4,
    eval_windows=2,
)
PAIRS = (0, 0, 2, 2)
ROOT = Path(__file__).resolve().parents[2]


def _ids(rows: int = 4, length: int = 64, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(2, 97, (rows, length), generator=draw)


@torch.no_grad()
def _twins(micro_llama: Any) -> Any:
    """Two layers; the second's keys and values are turned, mixed and swapped ones of the first."""
    net = micro_llama(layers=2, kv_heads=2, heads=4)
    first, second = (layer.self_attn for layer in net.model.layers)
    # Without the attention and the MLP of the first layer both see the embedding.
    first.o_proj.weight.zero_()
    net.model.layers[0].mlp.down_proj.weight.zero_()
    draw = torch.Generator().manual_seed(7)
    alpha = torch.complex(*torch.randn(2, 2, 8, 1, generator=draw))
    mix = torch.randn(2, 16, 16, generator=draw)
    k = first.k_proj.weight.view(2, 2, 8, -1).flip(0)  # [H, 2, D / 2, width], heads swapped
    turned = torch.complex(k[:, 0].contiguous(), k[:, 1].contiguous()) * alpha
    second.k_proj.weight.copy_(torch.stack([turned.real, turned.imag], 1).flatten(0, 2))
    v = first.v_proj.weight.view(2, 16, -1).flip(0)
    second.v_proj.weight.copy_(torch.einsum("hde,hdw->hew", mix, v).flatten(0, 1))
    return net


@torch.no_grad()
def test_what_least_squares_can_express_is_converted_without_loss(micro_llama: Any) -> None:
    net, ids = _twins(micro_llama), _ids()
    want = net(ids).logits
    seen = observe(net, ids)
    fit = fit_pair(seen, 1, 0)
    assert fit.head == (1, 0)
    assert fit.residual < 1e-3  # the ridge of 1e-4 and float32
    for start in ("least_squares", "joint"):
        tied = _twins(micro_llama)
        convert(tied, (0, 0), start, seen)  # type: ignore[arg-type]
        share(tied, (0, 0))
        assert (tied(ids).logits - want).std() < 2e-2 * want.std(), start
    kept = _twins(micro_llama)
    share(kept, (0, 0))
    assert (kept(ids).logits - want).std() > 0.2 * want.std()


@torch.no_grad()
@pytest.mark.parametrize("biases", [False, True])
def test_the_joint_start_leaves_least_of_the_group(micro_llama: Any, biases: bool) -> None:
    """Of keys and of values, over all layers of the group; least squares leaves the owner exact."""
    net = micro_llama(layers=3, attention_bias=biases)
    for name, weight in net.named_parameters():
        if name.endswith("bias"):
            weight.normal_(generator=torch.Generator().manual_seed(len(name)))
    seen = observe(net, _ids())
    keys, values, fits = fit_group(seen, (0, 1, 2), biases)
    x = seen.x[0]
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1) if biases else x
    made = [(x @ w.T).unflatten(1, (2, -1)).transpose(0, 1) for w in (keys, values)]
    joint, single = [0.0, 0.0], [0.0, 0.0]
    for layer, fit in enumerate(fits):
        alone = fit_pair(seen, layer, 0)
        for lost, k, v, how in ((joint, *made, fit), (single, seen.k[0], seen.v[0], alone)):
            turned = as_pairs(k[list(how.head)]) * how.alpha[:, None]
            lost[0] += float((as_pairs(seen.k[layer]) - turned).abs().square().sum())
            lost[1] += float((seen.v[layer] - v[list(how.head)] @ how.matrix).square().sum())
    assert fits[1].head == fit_pair(seen, 1, 0).head
    assert joint[0] < single[0] and joint[1] < single[1], (joint, single)


@torch.no_grad()
def test_average_is_the_mean_of_what_enters_attention(micro_llama: Any) -> None:
    net = micro_llama(layers=2)
    gains = [torch.rand(64) + 0.5 for _ in range(2)]
    for layer, gain in zip(net.model.layers, gains, strict=True):
        layer.input_layernorm.weight.copy_(gain)
    before = [
        layer.self_attn.v_proj.weight * g for layer, g in zip(net.model.layers, gains, strict=True)
    ]
    convert(net, (0, 0), "average")
    after = net.model.layers[0].self_attn.v_proj.weight * gains[0]
    torch.testing.assert_close(after, (before[0] + before[1]) / 2)


def test_architectures_that_cannot_be_folded() -> None:
    for family in ("qwen3", "gpt2"):
        with pytest.raises(ValueError, match="keep_first"):
            convert(build(family), (0, 0), "average")


def test_choose_map_is_the_best_of_all() -> None:
    rises = {1: 0.9, 2: 0.1, 3: 0.2, 4: 0.1, 5: 0.5}
    ties = [Tie(r, r - 1, 0.0, rise) for r, rise in rises.items()]
    assert choose_map(ties, 6, 4) == (0, 1, 1, 3, 3, 5)
    assert choose_map(ties, 6, 3) == (0, 0, 2, 2, 4, 4)  # the only one
    assert choose_map(ties, 6, 6) == tuple(range(6))
    with pytest.raises(ValueError, match="between 3 and 6"):
        choose_map(ties, 6, 2)


@torch.no_grad()
def test_measuring_leaves_the_model_alone(micro_llama: Any) -> None:
    net, ids = micro_llama(layers=3), _ids()
    before, want = copy.deepcopy(net.state_dict()), net(ids).logits
    ties = measure_ties(net, ids, 3)
    assert [(t.reader, t.owner) for t in ties] == [(1, 0), (2, 0), (2, 1)]
    assert all(0 < t.residual < 2 for t in ties)
    assert all(torch.equal(w, net.state_dict()[n]) for n, w in before.items())
    torch.testing.assert_close(net(ids).logits, want, rtol=0, atol=1e-5 * float(want.abs().max()))


@torch.no_grad()
def test_distillation_is_zero_for_the_teacher_itself(micro_llama: Any) -> None:
    net, other, ids = micro_llama(), micro_llama(seed=1), _ids()
    for mix in (Mix(), Mix(logits=0.0, hidden=1.0)):
        same = distillation(net, net, mix, False)(ids, ids)
        assert float(same) == pytest.approx(0.0, abs=1e-5)
        assert float(distillation(other, net, mix, False)(ids, ids)) > 0.05
    text = distillation(net, None, Mix(0.0, 0.0, 1.0), False)(ids[:, :-1], ids[:, 1:])
    assert float(text) == pytest.approx(float(net(ids, labels=ids).loss), rel=1e-5)


@pytest.fixture
def place(tmp_path: Path, micro_llama: Any) -> Path:
    write_model(tmp_path / "model", micro_llama, layers=4)
    write_text(tmp_path / "text.txt")
    return tmp_path


def _uptrain(place: Path, work: str, cla: Any = None, **changes: Any) -> Path:
    cfg = replace(Uptrain(OPTIM, fit_windows=4), **changes)
    data, model = TextfileData(path=str(place / "text.txt")), ModelConfig(str(place / "model"))
    cla = cla or Groups(factor=2)
    return uptrain(cfg, cla, data, model, None, place / work, NoLogger(), False)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_killed_run_continues_to_the_same_bits(
    place: Path, monkeypatch: pytest.MonkeyPatch, stages: int
) -> None:
    straight = _uptrain(place, "straight", stages=stages)
    step = loop._Step.__call__

    def dies(self: Any, number: int) -> dict[str, float]:
        if number == 4:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Step, "__call__", dies)
        with pytest.raises(KeyboardInterrupt):
            _uptrain(place, "killed", stages=stages)
    resumed = _uptrain(place, "killed", stages=stages)
    for name in ("model.safetensors", "training_log.jsonl"):
        assert (straight / name).read_bytes() == (resumed / name).read_bytes()


def test_training_gains_and_leaves_what_it_should(place: Path) -> None:
    out = _uptrain(place, "work", train="attention", recompute=True)
    record = json.loads((out / "training.json").read_text())
    assert record["owner"] == [0, 0, 2, 2]
    assert record["kv_bytes_per_token"] == 2 * 2 * 2 * 32 * 2 // 2
    before, _ = load_model(ModelConfig(str(place / "model")))
    after, _ = load_model(ModelConfig(str(out)))
    assert after.config.kv_owner == [0, 0, 2, 2]
    for (name, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        unread = any(f"layers.{i}.self_attn.{p}_proj" in name for i in (1, 3) for p in "kv")
        same = torch.equal(a.bfloat16(), b.bfloat16())
        assert same == (unread or "self_attn" not in name), name
    assert _uptrain(place, "work", train="attention", recompute=True) == out


def test_low_rank_terms_learn_and_are_folded_in(place: Path) -> None:
    pytest.importorskip("peft")
    out = _uptrain(place, "work", train="lora", rank=4)
    before, _ = load_model(ModelConfig(str(place / "model")))
    after, _ = load_model(ModelConfig(str(out)))
    names = [name for name, _ in before.named_parameters()]
    assert names == [name for name, _ in after.named_parameters()]  # no terms are left
    for name, weight in before.named_parameters():
        unread = any(f"layers.{i}.self_attn.{p}_proj" in name for i in (1, 3) for p in "kv")
        same = torch.equal(weight.bfloat16(), after.get_parameter(name).bfloat16())
        assert same == (unread or "self_attn" not in name), name
    record = json.loads((out / "training.json").read_text())
    assert record["heldout"]["loss"] < record["converted_loss"] + 0.05


def test_without_peft_low_rank_terms_are_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="pip install peft") as error:
        _uptrain(place, "work", train="lora")
    assert "\n" not in str(error.value)


def test_a_measured_map(place: Path) -> None:
    out = _uptrain(place, "work", Measured(owners=3))
    assert len(set(json.loads((out / "training.json").read_text())["owner"])) == 3


def test_refusals(place: Path) -> None:
    for cla, words in ((Groups(factor=5), "at most"), (Map(owner=(0, 1)), "one entry a layer")):
        with pytest.raises(ValueError, match=words):
            _uptrain(place, "work", cla)
    with pytest.raises(ValueError, match="one above 0"):
        Mix(0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"uptrain\.stages"):
        _uptrain(place, "work", stages=0)


def test_from_scratch_and_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Sentence {i} of {i * 7919 % 1000}." for i in range(3000)))
    common = ["experiment=cla_pretrain", "data=textfile", f"data.path={text}", "debug=smoke"]
    for seed, cla in ((0, "none"), (1, "none"), (0, "factor2")):
        more = [f"cla={cla}", f"pretrain.seed={seed}"]
        run(load(TrainConfig, "train", [*common, *more]), tmp_path / f"{cla}{seed}")
    shared = json.loads((tmp_path / "factor20" / "model" / "training.json").read_text())
    assert shared["owner"] == [0, 0]
    table = sharing.rows(sharing.find([tmp_path]))
    assert [(row[1], row[2], row[6]) for row in table] == [
        (2 * 2 * 16 * 2, "MQA", 2),
        (2 * 2 * 16, "MQA, 1 of 2 own", 1),
    ]
    assert sharing.main([str(tmp_path)]) == 0
    assert "1 of 2 own" in capsys.readouterr().out
    assert sharing.main([str(text.parent / "nothing")]) == 1


def test_a_rate_with_more_seeds_is_shown_before_a_lucky_one():
    tried = [(5e-3, 15.0), (5e-3, 17.0), (1e-2, 15.5), (2e-2, 18.0), (2e-2, 19.0)]
    models = [sharing.Trained(10, 64, 4, 2, 4, 4, lr, found) for lr, found in tried]
    assert [row[3:] for row in sharing.rows(models)] == [(5e-3, "16.00", "1.41", 2, 3)]


SETTINGS = [
    "uptrain.optim.tokens=512",
    "uptrain.optim.batch_tokens=128",
    "uptrain.optim.phases=[{share: 1.0, length: 32}]",
    "uptrain.optim.warmup_steps=1",
    "uptrain.optim.precision=float32",
    "uptrain.optim.checkpoint_steps=1",
    "uptrain.optim.eval_steps=4",
    "uptrain.optim.eval_windows=2",
    "uptrain.fit_windows=4",
    "cla=factor2",
]


def _given(place: Path, work: str) -> list[str]:
    text = ["data=textfile", f"data.path={place}/text.txt"]
    return [f"model.path={place}/model", *text, *SETTINGS, f"work={place}/{work}"]


def _command(place: Path, work: str) -> list[str]:
    return [str(ROOT / "train.py"), *_given(place, work), f"hydra.run.dir={place}/hydra"]


def _weights(place: Path, work: str) -> dict[str, Tensor]:
    (folder,) = (place / work).glob("*/model")
    return load_file(folder / "model.safetensors")


def _checkpoint(place: Path, work: str) -> dict[str, Tensor]:
    (file,) = (place / work).glob("*/checkpoint.safetensors")
    return load_file(file)


def test_processes_and_pieces_take_the_steps_of_one(place: Path) -> None:
    run(load(TrainConfig, "train", _given(place, "one")), place / "hydra")
    run(load(TrainConfig, "train", [*_given(place, "pieces"), "pieces=2"]), place / "h")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    for work, own in (("two", {}), ("spread", zero)):
        common = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **common, **own}
        command = [*launch, "--master_port", "29617", *_command(place, work)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("wrote") == 1  # one of the two speaks
        assert done.stdout.count("FSDP2 spreads weights over 2") == (work == "spread")
    one = _weights(place, "one")
    assert _weights(place, "spread").keys() == one.keys()
    for other in ("pieces", "two", "spread"):
        # Each was written after a forward pass alone, which leaves spread weights together.
        assert _checkpoint(place, other).keys() == _checkpoint(place, "one").keys()
        for name, weight in _weights(place, other).items():
            # Sums of another order, through 4 steps of Adam; then weights are rounded to bfloat16,
            # whose steps are 2^-8 of a value.
            torch.testing.assert_close(weight, one[name], rtol=2**-7, atol=1e-4)


def test_killed_by_the_system_a_run_ends_in_the_same_bytes(place: Path) -> None:
    (place / "hydra").mkdir()
    quick = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *_command(place, "killed"), "uptrain.optim.tokens=4096"]
    process = subprocess.Popen(command, env=quick, stdout=subprocess.DEVNULL)
    while not list((place / "killed").glob("*/checkpoint.safetensors")):
        time.sleep(0.002)
        assert process.poll() is None
    process.kill()  # SIGKILL
    assert process.wait() == -signal.SIGKILL
    assert not list((place / "killed").glob("*/model"))
    for work in ("killed", "whole"):
        cfg = [*_given(place, work), "uptrain.optim.tokens=4096"]
        run(load(TrainConfig, "train", cfg), place / "hydra")
    (killed,), (whole,) = ((place / work).glob("*/model") for work in ("killed", "whole"))
    for name in ("model.safetensors", "training_log.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_batches_that_cannot_be_divided_are_one_line(place: Path) -> None:
    cfg = load(TrainConfig, "train", [*_given(place, "w"), "pieces=3"])
    with pytest.raises(ValueError, match="a multiple of 1 processes x 3 pieces, got 4"):
        run(cfg, place / "h")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], r"cla=factor2; or less=h2o_budget512"),
        (["cla=factor2", "less=h2o_budget512"], "left out with cla"),
        (["experiment=cla_pretrain", "less=h2o_budget512"], "left out with experiment"),
        (["experiment=cla_pretrain", "cla=measured"], "known before training"),
        (["experiment=cla_pretrain", "cla=map", "cla.owner=[0,2,2,2,4,4]"], "earlier layer"),
    ],
)
def test_choices_that_clash_are_one_line(tmp_path: Path, given: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        run(load(TrainConfig, "train", given), tmp_path)
    assert "\n" not in str(error.value)
