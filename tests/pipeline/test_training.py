"""Pretraining: exact continuation, attention and dropout against their definitions, refusals."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvsmith.pipeline.config import DebugConfig, load
from kvsmith.pipeline.data import TextfileData
from kvsmith.pipeline.log import NoLogger, Run
from kvsmith.pipeline.model import ModelConfig, load_model
from kvsmith.pipeline.train import TrainConfig, run
from kvsmith.pipeline.training import loop
from kvsmith.pipeline.training.architecture import Architecture, build_model
from kvsmith.pipeline.training.attention import block_attention, register
from kvsmith.pipeline.training.checkpoint import load_checkpoint
from kvsmith.pipeline.training.dropout import Dropout
from kvsmith.pipeline.training.heldout import heldout_loss
from kvsmith.pipeline.training.plan import Optim, Phase
from kvsmith.pipeline.training.pretrain import Pretrain, parameters, pretrain
from kvsmith.pipeline.training.tokenizer import train_tokenizer
from kvsmith.pipeline.training.windows import Windows, mix

ARCH = Architecture(
    vocab_size=300,
    hidden_size=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_size=24,
    context=32,
)
OPTIM = Optim(
    tokens=640,
    batch_tokens=64,
    phases=(Phase(0.5, 16), Phase(0.5, 32)),
    lr=1e-2,
    warmup_steps=2,
    dropout=0.1,
    precision="float32",
    compile=False,
    checkpoint_steps=4,
    eval_steps=5,
    eval_windows=1,
)


class Stop(Exception):
    """A run dies."""


def _model() -> Any:
    net = build_model(ARCH, 0, seed=1)
    net.set_attn_implementation(register())
    return net


def _stream(tokens: int = 999) -> Tensor:
    return torch.randint(0, ARCH.vocab_size, (tokens,), generator=torch.Generator().manual_seed(5))


def _fit(folder: Path, cfg: Optim = OPTIM, identity: str = "x") -> Any:
    net = _model()
    heldout = _stream(64).view(2, 32)
    with Run(folder) as log:
        loop.fit(net, _stream(), heldout, cfg, 3, log, folder / "checkpoint.safetensors", identity)
    return net


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    lines = (
        f"Sentence {i} says that {i * 7919 % 1000} follows {i * 31 % 97}." for i in range(3000)
    )
    path.write_text("\n\n".join(lines))
    return path


def test_a_killed_run_continues_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = _fit(tmp_path / "straight")
    step = loop._Step.__call__

    def dies(self: Any, number: int) -> dict[str, float]:
        if number == 6:
            raise Stop
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Step, "__call__", dies)
        with pytest.raises(Stop):
            _fit(tmp_path / "killed")
    resumed = _fit(tmp_path / "killed")
    for (name, a), (_, b) in zip(
        straight.named_parameters(), resumed.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("straight", "killed")]
    assert rows[0] == rows[1]
    moments = [
        load_file(tmp_path / name / "checkpoint.safetensors") for name in ("straight", "killed")
    ]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])


def test_training_changes_every_weight_and_lowers_the_loss(tmp_path: Path) -> None:
    net = _fit(tmp_path, replace(OPTIM, tokens=6400, dropout=0.0))
    for (name, a), (_, b) in zip(_model().named_parameters(), net.named_parameters(), strict=True):
        assert not torch.equal(a, b), name
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    assert rows[-1]["tokens"] == 6400 and "heldout_loss" in rows[-1]


def test_sigterm_writes_a_checkpoint_and_exits_143(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = loop._Step.__call__

    def signalled(self: Any, number: int) -> dict[str, float]:
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    monkeypatch.setattr(loop._Step, "__call__", signalled)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        _fit(tmp_path)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    net = _model()
    done = load_checkpoint(
        tmp_path / "checkpoint.safetensors", net, loop._optimizer(net, OPTIM), "x"
    )
    assert done.steps == 3 and done.seconds > 0


def test_a_checkpoint_of_another_run_or_cut_short_is_refused(tmp_path: Path) -> None:
    _fit(tmp_path, replace(OPTIM, tokens=64))
    with pytest.raises(ValueError, match="must be of run y, got x"):
        _fit(tmp_path, replace(OPTIM, tokens=64), identity="y")
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors: file must be a whole"):
        _fit(tmp_path, replace(OPTIM, tokens=64))


def test_a_loss_that_is_not_finite_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.F, "cross_entropy", lambda *_, **__: torch.tensor(math.nan))
    with pytest.raises(ValueError, match="training: loss at step 1 must be finite, got nan"):
        _fit(tmp_path)


@pytest.mark.parametrize("length", [1, 63, 256, 300, 513])
def test_block_attention_is_causal_attention(length: int) -> None:
    draw = torch.Generator().manual_seed(length)
    q = torch.randn(2, 4, length, 8, generator=draw)
    k, v = (torch.randn(2, 2, length, 8, generator=draw) for _ in range(2))
    out, _ = block_attention(torch.nn.Identity(), q, k, v, None, scaling=0.3)
    square = (q * 0.3) @ k.repeat_interleave(2, 1).transpose(-1, -2)
    square = square + torch.full((length, length), -math.inf).triu(1)
    expected = (square.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)  # float32 sums of <= 513 terms


def test_training_attention_agrees_with_the_library(tmp_path: Path) -> None:
    net, ids = _model().eval(), _stream(32).view(1, 32)
    ours = net(input_ids=ids, use_cache=False).logits
    net.set_attn_implementation("sdpa")
    theirs = net(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_dropout_keeps_the_mean_and_is_a_function_of_the_step() -> None:
    net = _model()
    dropout = Dropout(net, 0.25, 7, torch.float32)
    dropout.draw(64, 32, step=1)
    first = dropout._mask.clone()
    assert first.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    # 64 * 32 * (16 + 16 * 4) draws: four standard deviations of the share of zeros
    assert abs(float((first == 0).float().mean()) - 0.25) < 4 * math.sqrt(
        0.25 * 0.75 / first.numel()
    )
    dropout.draw(64, 32, step=2)
    assert not torch.equal(first, dropout._mask)
    dropout.draw(64, 32, step=1)
    assert torch.equal(first, dropout._mask)


def test_dropout_acts_in_training_only_and_can_be_removed() -> None:
    net, ids = _model(), _stream(32).view(1, 32)
    plain = net(input_ids=ids, use_cache=False).logits
    dropout = Dropout(net, 0.5, 0, torch.float32)
    dropout.draw(1, 32, 0)
    assert not torch.allclose(net(input_ids=ids, use_cache=False).logits, plain)
    assert torch.equal(net.eval()(input_ids=ids, use_cache=False).logits, plain)
    net.train()
    dropout.remove()
    assert torch.equal(net(input_ids=ids, use_cache=False).logits, plain)


def test_windows_visit_each_place_once_a_pass_and_nothing_else() -> None:
    stream = torch.arange(101)
    windows = Windows(stream, length=10, batch=3, seed=4)
    per_pass = 9
    seen = torch.cat([windows.batch(step) for step in range(6)])
    assert seen.shape == (18, 11)
    assert bool((seen[:, 1:] - seen[:, :-1] == 1).all())
    for part in seen.split(per_pass):
        starts = part[:, 0]
        assert len({int(s) for s in starts}) == per_pass
        assert len({int(s) % 10 for s in starts}) == 1
    assert torch.equal(Windows(stream, 10, 3, 4).batch(5), windows.batch(5))
    assert not torch.equal(Windows(stream, 10, 3, 5).batch(5), windows.batch(5))


def test_windows_refuse_too_little_text() -> None:
    with pytest.raises(ValueError, match="at least 21 tokens, got 20"):
        Windows(torch.arange(20), 10, 1, 0)


def test_mixed_seeds_differ_and_fit_a_generator() -> None:
    seeds = {mix(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seeds) == 512
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_learning_rate_warms_up_and_falls_to_its_end() -> None:
    cfg = replace(OPTIM, tokens=6400, warmup_steps=10, lr=1.0, final_lr=0.1)
    assert cfg.steps == 100
    assert cfg.lr_at(0) == pytest.approx(0.1)
    assert cfg.lr_at(10) == pytest.approx(1.0)
    assert cfg.lr_at(100) == pytest.approx(0.1)
    assert [cfg.length_at(s) for s in (0, 49, 50, 99)] == [16, 16, 32, 32]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "pretrain.optim.tokens: value must be positive"),
        ({"dropout": 1.0}, "pretrain.optim.dropout: value must be in"),
        ({"phases": (Phase(0.5, 16),)}, "shares must be at least one, with sum 1"),
        ({"phases": (Phase(1.0, 17),)}, "a divisor of batch_tokens"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(OPTIM, **change)


def test_phases_longer_than_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match="at most pretrain.arch.context"):
        Pretrain(arch=replace(ARCH, context=16), optim=OPTIM)


def test_heldout_loss_of_a_uniform_model_is_the_log_of_the_vocabulary() -> None:
    net = _model()
    torch.nn.init.zeros_(net.lm_head.weight)
    assert heldout_loss(net, _stream(64).view(2, 32)) == pytest.approx(math.log(300), rel=1e-6)
    assert net.training


def test_tokenizer_is_lossless_and_pads_left() -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat, the end"] * 50, 270, 64)
    text = "Zo\u00eb \u2014 \U0001f600\n\n    indented"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 270
    both = tokenizer(["the", "the cat sat"], padding=True, return_tensors="pt")
    assert both["attention_mask"][0].tolist()[0] == 0
    assert tokenizer.eos_token == "<|endoftext|>" == tokenizer.pad_token


def test_pretraining_writes_a_whole_model_once(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = Pretrain(arch=ARCH, optim=replace(OPTIM, tokens=640), prompt="Sentence 5")
    data, model = TextfileData(path=str(text)), ModelConfig(path="micro", device="cpu")
    output, work = tmp_path / "out" / "micro", tmp_path / "work"

    def train(cfg: Pretrain, overwrite: bool = False) -> None:
        pretrain(cfg, data, model, output, work, NoLogger(), overwrite)

    train(cfg)
    net, tokenizer = load_model(ModelConfig(path=str(output), device="cpu"))
    record = json.loads((output / "training.json").read_text())
    assert record["parameters"] == parameters(net) and record["tokens_seen"] == 640
    assert net.config.dtype == torch.float32  # loaded; the file holds bfloat16
    assert load_file(output / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    card = (output / "README.md").read_text()
    assert f"**{record['heldout']['perplexity']:.3f}**" in card
    assert len((output / "training_log.jsonl").read_text().splitlines()) == 2
    assert len(tokenizer) == ARCH.vocab_size
    assert not list(output.parent.glob(".*"))
    capsys.readouterr()
    train(cfg)
    assert "nothing to do" in capsys.readouterr().out
    other = replace(cfg, seed=9)
    with pytest.raises(ValueError, match="overwrite=true"):
        train(other)
    train(other, overwrite=True)
    assert json.loads((output / "training.json").read_text())["identity"] != record["identity"]


def test_train_without_an_experiment_says_what_there_is(tmp_path: Path) -> None:
    cfg = load(TrainConfig, "train")
    with pytest.raises(ValueError, match="experiment=pretrain_small, experiment=pretrain_tiny"):
        run(cfg, tmp_path)


def test_smoke_trains_a_toy_into_the_run_folder(tmp_path: Path, text: Path) -> None:
    overrides = ["experiment=pretrain_tiny", "data=textfile", f"data.path={text}", "debug=smoke"]
    cfg = load(TrainConfig, "train", overrides)
    assert cfg.debug == DebugConfig(smoke=True)
    run(cfg, tmp_path)
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_the_experiments_have_the_promised_sizes() -> None:
    cfg = load(TrainConfig, "train", ["experiment=pretrain_tiny"]).pretrain
    assert cfg is not None and cfg.optim.tokens >= 25_000_000
    with torch.device("meta"):
        tiny = parameters(build_model(cfg.arch, 0, 0))
        config = load(TrainConfig, "train", ["experiment=pretrain_small"])
        assert config.pretrain is not None
        small = parameters(build_model(config.pretrain.arch, 0, 0))
    assert tiny <= 5_000_000 and cfg.arch.head_dim == 64 and cfg.arch.context == 1024
    assert 15_000_000 <= small <= 17_000_000
    assert config.model.label == "small"
    arch = config.pretrain.arch
    assert (arch.layers, arch.heads, arch.kv_heads, arch.head_dim) == (8, 6, 2, 64)
