"""From the folder `conf/` to frozen dataclasses: the one module that knows Hydra.

A script is `launch("train", TrainConfig, run)`. Hydra composes `conf/train.yaml` and the command
line, `strict.from_dict` checks the result, and `run(cfg, folder)` does the work; `folder` is this
run's own folder, `runs/<job>/<date_time>`. Whatever the user got wrong ends as one line on stderr
and exit code 1; KVSMITH_DEBUG=1 shows the traceback instead.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

import kvsmith
from kvsmith.errors import explain
from kvsmith.pipeline.ranks import (
    TERMINATED,
    check_processes,
    end_on_sigterm,
    let_the_first_speak,
    rank,
    speaks,
)
from kvsmith.strict import from_dict, to_dict

T = TypeVar("T")

USER_ERRORS = (ValueError, TypeError, OSError)
NOT_IDENTITY = ("device", "device_map", "workers", "logger")


@dataclass(frozen=True)
class DebugConfig:
    """`debug=smoke`: every script shrinks its work to seconds, along the same path."""

    smoke: bool = False


def repository_root() -> Path:
    """The folder that holds `kvsmith/`: relative paths start here, wherever a script is run."""
    return Path(kvsmith.__file__).resolve().parent.parent


def conf_folder() -> Path:
    """The folder of YAML files."""
    return Path(kvsmith.__file__).resolve().parent / "conf"


def input_path(path: str) -> Path:
    """Where an existing file or folder of the configuration is.

    Args:
        path: absolute, or relative to the current folder (if something is there) or to the
            repository root.

    Returns:
        An absolute path; whether it exists is the caller's question.
    """
    here = Path(path).expanduser()
    if here.is_absolute() or here.exists():
        return here.absolute()
    return repository_root() / here


def output_path(path: str) -> Path:
    """Where a result goes: absolute, or relative to the repository root."""
    return repository_root() / Path(path).expanduser()


def compose(name: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Compose a configuration without a script.

    Args:
        name: primary file in `conf/`, without `.yaml`.
        overrides: as on the command line, for example `["model=tiny", "data.path=book.txt"]`.

    Returns:
        Plain data, everything resolved.

    Raises:
        ValueError: Hydra refuses; one line, with near misses.
    """
    try:
        with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
            return _plain(hydra.compose(name, list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_one_line(name, error)) from error


def read_option(group: str, name: str) -> dict[str, Any]:
    """The option `name` of the folder `group`; a hundred times faster than `compose` where its file
    builds on no other.
    """
    config = OmegaConf.load(conf_folder() / group / f"{name}.yaml")
    assert isinstance(config, DictConfig)
    found = _plain(config)
    if "defaults" in found:
        return dict(compose(f"{group}/{name}")[group])
    return found


def load(cls: type[T], name: str, overrides: Iterable[str] = ()) -> T:
    """Compose `conf/<name>.yaml` with `overrides` and read it into the dataclass `cls`.

    Raises:
        ValueError, TypeError: as `compose` and `strict.from_dict`.
    """
    return _typed(cls, name, compose(name, overrides))


def launch(
    name: str, cls: type[T], run: Callable[[T, Path], object], processes: bool = False
) -> None:
    """The whole body of an entry-point script; ends the process.

    Args:
        name: primary file in `conf/`, without `.yaml`.
        cls: the frozen dataclass that the configuration is read into.
        run: called with the dataclass and the folder of this run's logs.
        processes: whether several processes, as torchrun starts them, work on one run.
    """
    composed: list[tuple[DictConfig, str]] = []

    @hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=name)
    def script(config: DictConfig) -> None:
        composed.append((config, HydraConfig.get().runtime.output_dir))

    def guarded() -> None:
        check_names()
        check_processes(f"{name}.py", processes)
        if rank():
            # the first process has a folder for all
            sys.argv += ["hydra.run.dir=.", "hydra.output_subdir=null"]
        try:
            script()
            checked = [(_typed(cls, name, _plain(c)), Path(folder)) for c, folder in composed]
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(_one_line(name, error)) from error
        # Only now, outside of Hydra: within its job `compose` does not work, and it prints a line
        # of its own before each error.
        for cfg, folder in checked:
            run(cfg, folder)

    # Hydra then raises what went wrong, instead of printing several lines and exiting by itself.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.exit(main_guard(guarded))


def check_names() -> None:
    """Refuse file names that this process can only keep as raw bytes: tokenizers cannot open them.

    Raises:
        ValueError: the locale has no UTF-8 and a name on the command line needs it.
    """
    if any("\udc80" <= c <= "\udcff" for text in (*sys.argv, os.getcwd()) for c in text):
        remedy = "Set PYTHONUTF8=1, or LC_ALL=C.UTF-8."
        got = sys.getfilesystemencoding()
        raise ValueError(explain("locale", "encoding of file names", "UTF-8", got, remedy))


def main_guard(run: Callable[[], object]) -> int:
    """Call `run`; turn a user's error into one line on stderr.

    Args:
        run: the work. ValueError, TypeError and OSError are taken as the user's; anything else is a
            bug of ours and keeps its traceback.

    Returns:
        The exit code: 0, 1 after a user's error, 130 after Ctrl-C.

    Raises:
        SystemExit: the work left by itself.
    """
    end_on_sigterm()
    try:
        run()
    except USER_ERRORS as error:
        let_the_first_speak()
        if os.environ.get("KVSMITH_DEBUG") == "1":
            traceback.print_exc()
        else:
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command continues where it stopped\n")
        return 130
    except SystemExit as leaving:
        if leaving.code == TERMINATED and speaks():
            sys.stderr.write("stopped by SIGTERM; the same command continues where it stopped\n")
        raise
    return 0


def config_hash(config: object, exclude: Iterable[str] = NOT_IDENTITY) -> str:
    """Name a configuration by its content.

    Args:
        config: a dataclass or plain data.
        exclude: keys that do not count, at any depth: where and how loudly a thing is computed is
            not what it is.

    Returns:
        8 hexadecimal digits, the start of the SHA-256 of the canonical JSON (sorted keys).
    """
    text = json.dumps(
        _without(to_dict(config), frozenset(exclude)), sort_keys=True, separators=(",", ":")
    )
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def experiments(prefix: str) -> list[str]:
    """Names of the experiments in `conf/experiment` that begin with `prefix`."""
    return sorted(p.stem for p in (conf_folder() / "experiment").glob(f"{prefix}*.yaml"))


def _without(data: Any, names: frozenset[str]) -> Any:
    if isinstance(data, Mapping):
        return {k: _without(v, names) for k, v in data.items() if k not in names}
    if isinstance(data, list):
        return [_without(v, names) for v in data]
    return data


def _plain(config: DictConfig) -> dict[str, Any]:
    try:
        data = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        raise ValueError(
            explain(key, "value", "given", "nothing", f"Add {key}=... to the command line.")
        ) from error
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}


def _typed(cls: type[T], name: str, data: Mapping[str, Any]) -> T:
    """`from_dict`, with the file's name where an error sits at the top level."""
    try:
        return from_dict(cls, data, "")
    except (ValueError, TypeError) as error:
        text = str(error)
        if not text.startswith(":"):
            raise
        raise type(error)(f"conf/{name}.yaml{text}") from error


def _one_line(name: str, error: Exception) -> str:
    """Hydra's and OmegaConf's errors as one sentence of ours."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = [str(o) for o in error.options or ()]
        return explain(
            group or name,
            "value",
            f"one of {', '.join(options)}",
            repr(option),
            _near(option, options),
        )
    text = " ".join(str(error).split())
    unknown = re.search(
        r"Could not (?:override|append to config|delete from config)[^']*'([^']+)'", text
    )
    if unknown is None:
        return f"conf/{name}.yaml: {text}"
    key = unknown.group(1)
    known = _known_keys(name)
    siblings = [k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]]
    remedy = (
        _near(key, known)
        or f"There are {', '.join(siblings or [k for k in known if '.' not in k])}."
    )
    return explain(f"conf/{name}.yaml", "key", "one of the configuration's", repr(key), remedy)


def _known_keys(name: str) -> list[str]:
    """Dotted names that the command line of `conf/<name>.yaml` understands."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose(name), resolve=False)
    groups = [p.name for p in conf_folder().iterdir() if p.is_dir()]
    return sorted({*groups, *_dotted(config, "")})


def _dotted(data: Any, prefix: str) -> Iterable[str]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield f"{prefix}{key}"
            yield from _dotted(value, f"{prefix}{key}.")


def _near(key: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(names), n=2)
    return f"Did you mean {' or '.join(close)}?" if close else ""
