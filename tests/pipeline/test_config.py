"""Every option composes and parses; every mistake is one line with a near miss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvsmith.pipeline import config
from kvsmith.pipeline.config import (
    compose,
    conf_folder,
    config_hash,
    experiments,
    input_path,
    load,
    main_guard,
    output_path,
    repository_root,
)
from kvsmith.pipeline.data import PydocsData, TextfileData
from kvsmith.pipeline.log import NoLogger, WandbLogger
from kvsmith.pipeline.model import ModelConfig
from kvsmith.pipeline.train import TrainConfig

TINY = "artifacts/models/tiny"


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


def test_the_default_parses() -> None:
    cfg = load(TrainConfig, "train")
    assert cfg.model == ModelConfig(path=TINY)
    assert cfg.data == PydocsData() and cfg.logger == NoLogger() and cfg.pretrain is None


@pytest.mark.parametrize("group", ["model", "data", "logger", "debug", "cla"])
def test_every_option_of_every_group_parses(group: str) -> None:
    assert _options(group)
    for option in _options(group):
        extra = ["data.path=x.txt"] if option == "textfile" else []
        if option == "hub":
            extra = ["data.path=a/b", "data.train=x", "data.heldout=y"]
        load(TrainConfig, "train", [f"{group}={option}", *extra])


@pytest.mark.parametrize("name", [*experiments("pretrain"), *experiments("cla")])
def test_every_pretraining_parses(name: str) -> None:
    assert load(TrainConfig, "train", [f"experiment={name}"]).pretrain is not None


def test_overrides_reach_the_dataclasses() -> None:
    overrides = ["data=textfile", "data.path=a b.txt", "logger=wandb", "logger.mode=offline"]
    cfg = load(TrainConfig, "train", [*overrides, "model.path=/m/llama", "model.dtype=bfloat16"])
    assert cfg.data == TextfileData(path="a b.txt")
    assert cfg.logger == WandbLogger(mode="offline")
    assert cfg.model.label == "llama" and cfg.model.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle=tiny", "key must be one of the configuration's, got 'modle'. Did you mean model"),
        ("model.pth=x", "got 'model.pth'. Did you mean model.path"),
        (
            "model=tny",
            "value must be one of falcon-7b, .*, tiny, got 'tny'. Did you mean tiny?",
        ),
        ("model.weight_bits=3", "model.weight_bits: value must be one of 8, 4, got 3"),
        ("model.attn_implementation=x/y", "model.attn_implementation: value must be one of sdpa"),
        ("model.dtype=float3", "model.dtype: value must be one of auto, float32, .*Did you mean"),
        ("+modle=1", "conf/train.yaml: key must be one of .* got 'modle'. Did you mean model?"),
        ("overwrite=3", r"overwrite: value must be of type bool, got 3 \(int\)"),
        ("data=textfile", "data.path: value must be given, got nothing. Add data.path=..."),
        (
            "experiment=pretrain_tin",
            "experiment: value must be one of .*Did you mean pretrain_tiny",
        ),
        ("zzz=1", "got 'zzz'. There are .*data, debug"),
        ("~modle", "got 'modle'. Did you mean model"),
        ("model=[", "conf/train.yaml: "),
    ],
)
def test_a_mistake_is_one_line_with_a_near_miss(override: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as error:
        load(TrainConfig, "train", [override])
    assert "\n" not in str(error.value)


def test_the_hash_ignores_where_and_order_but_not_what() -> None:
    plain = {"a": 1, "model": {"path": "x", "device": "cpu"}, "logger": {"kind": "none"}}
    same = {"model": {"device": "cuda", "path": "x"}, "a": 1, "workers": 3}
    other = {"a": 2, "model": {"path": "x"}}
    assert config_hash(plain) == config_hash(same) != config_hash(other)
    assert config_hash(ModelConfig(path="x")) == config_hash(ModelConfig(path="x", device="cpu"))
    assert config_hash(plain, exclude=()) != config_hash(same, exclude=())
    assert config_hash({"a": 1}) == "015abd7f"  # SHA-256 of {"a":1}


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert input_path("conf") == repository_root() / "conf"
    (tmp_path / "conf").mkdir()
    assert input_path("conf") == tmp_path / "conf"
    assert output_path("x/y") == repository_root() / "x" / "y"
    assert input_path("/a/b") == output_path("/a/b") == Path("/a/b")
    assert (repository_root() / "kvsmith" / "strict.py").is_file()
    assert (conf_folder() / "train.yaml").is_file()


def test_the_guard_makes_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def user() -> None:
        raise ValueError("two\n  lines")

    def interrupted() -> None:
        raise KeyboardInterrupt

    def bug() -> None:
        raise RuntimeError("ours")

    monkeypatch.delenv("KVSMITH_DEBUG", raising=False)
    assert main_guard(lambda: None) == 0
    assert main_guard(user) == 1
    assert capsys.readouterr().err == "error: two lines\n"
    assert main_guard(interrupted) == 130
    with pytest.raises(RuntimeError):
        main_guard(bug)
    monkeypatch.setenv("KVSMITH_DEBUG", "1")
    capsys.readouterr()
    assert main_guard(user) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """An entry point with a configuration folder of its own."""
    (tmp_path / "conf" / "hydra").mkdir(parents=True)
    quiet = "  - override hydra/job_logging: none\n  - override hydra/hydra_logging: none\n"
    text = f"defaults:\n  - _self_\n{quiet}word: a\nnumber: 1\nhydra: {{job: {{name: echo}}}}\n"
    (tmp_path / "conf" / "echo.yaml").write_text(text)
    path = tmp_path / "echo.py"
    path.write_text(
        "import sys\nfrom dataclasses import dataclass\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(repository_root())!r})\n"
        "from kvsmith.pipeline import config\n"
        "config.conf_folder = lambda: Path(__file__).parent / 'conf'\n"
        "@dataclass(frozen=True)\n"
        "class Echo:\n    word: str\n    number: int = 1\n"
        "def run(cfg, folder):\n"
        "    if cfg.number == 0: raise ValueError('number: zero')\n"
        "    sys.stdout.write(f'{cfg.word} {cfg.number} {(folder / \".hydra\").is_dir()}\\n')\n"
        "if __name__ == '__main__':\n    config.launch('echo', Echo, run)\n"
    )
    return path


def _call(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "KVSMITH_DEBUG"}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=script.parent, env=environment, check=False
    )


def test_a_script_from_the_command_line(script: Path) -> None:
    done = _call(script, "-m", "number=2,3", "word=hello")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["hello", "2", "True", "hello", "3", "True"]
    failed = _call(script, "number=0")
    assert (failed.returncode, failed.stdout, failed.stderr) == (1, "", "error: number: zero\n")
    wrong = _call(script, "wrod=b")
    assert wrong.returncode == 1 and wrong.stdout == ""
    assert wrong.stderr.count("\n") == 1 and "Did you mean word?" in wrong.stderr


def test_composing_leaves_no_global_state() -> None:
    assert compose("train") == compose("train")
    assert not config.GlobalHydra.instance().is_initialized()
