"""The packaging: pins, wheel contents, type checks through the links, make targets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("kernels", "pipeline", "conf")
# torch from PyPI pins its CUDA libraries itself.
PINNED_BY_TORCH = ("nvidia-", "cuda-")


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {name: version for name, version in pairs}


def _declared(*extras: str) -> list[Requirement]:
    project = _project()["project"]
    optional = project["optional-dependencies"]
    texts = project["dependencies"] + [text for extra in extras for text in optional[extra]]
    return [Requirement(text) for text in texts]


def _closure(requirements: list[Requirement]) -> set[str]:
    """Names of all that the requirements bring in on this machine."""
    todo, done = list(requirements), set()
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), sorted(requirement.extras)
        if (name, *extras) in done:
            continue
        done.add((name, *extras))
        for child in map(Requirement, distribution(name).requires or []):
            marker = child.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in ("", *extras)):
                todo.append(child)
    return {name for name, *_ in done}


def test_constraints_pin_all_that_setup_installs() -> None:
    pins = _pins()
    assert pins["torch"] == "2.13.0"
    assert all(
        re.fullmatch(r"[a-z0-9-]+", n) and re.fullmatch(r"[\d.]+(b\d+)?", pins[n]) for n in pins
    )
    names = _closure(_declared("factory", "report", "dev"))
    loose = {name for name in names - set(pins) if not name.startswith(PINNED_BY_TORCH)}
    assert "numpy" in names and not loose, f"constraints.txt lacks {sorted(loose)}"


def test_pins_satisfy_the_declared_floors() -> None:
    pins = _pins()
    for requirement in _declared("factory", "report", "dev"):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])
        assert all(part.operator == ">=" for part in requirement.specifier), requirement


def test_the_runtime_needs_three_packages() -> None:
    base = {r.name: r.specifier for r in _declared()}
    assert set(base) == {"torch", "transformers", "safetensors"}
    assert base["torch"] == SpecifierSet(">=2.11")
    assert base["transformers"] == SpecifierSet(">=5.17")


def test_the_links_are_relative() -> None:
    for name in LINKS:
        assert os.readlink(ROOT / "kvsmith" / name) == os.path.join("..", name)


def test_a_foreign_package_named_kernels_wins(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    path = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels, kvsmith.kernels.pack"
    done = _python("-c", f"{path}; print(kernels.__file__)", cwd=ROOT)
    assert Path(done.stdout.strip()).is_relative_to(tmp_path), done.stderr


def _copy(target: Path) -> Path:
    """What a wheel is built from, links kept; no build folder lands in the clone."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("kvsmith", *LINKS):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target / name)
    return target


def _files(folder: Path) -> set[str]:
    """Code and configuration below a folder; links are not followed."""
    return {
        (Path(parent) / name).relative_to(folder).as_posix()
        for parent, _, names in os.walk(folder)
        for name in names
        if name.endswith((".py", ".yaml", ".c", ".h")) and "__pycache__" not in parent
    }


def _python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_wheel_holds_every_file_and_imports(tmp_path: Path) -> None:
    tree = _copy(tmp_path / "tree")
    cache = tree / "kvsmith" / "__pycache__"
    cache.mkdir()
    (cache / "errors.yaml").write_text("a: 1\n")
    build = ["-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    done = _python(*build, cwd=tree)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {n for n in archive.namelist() if ".dist-info/" not in n}
        archive.extractall(tmp_path / "installed")
    links = {f"{name}/{file}" for name in LINKS for file in _files(tree / name)}
    assert all(any(file.startswith(f"{name}/") for file in links) for name in LINKS)
    assert packed == {f"kvsmith/{file}" for file in links | _files(tree / "kvsmith")}
    program = "import kvsmith.kernels.pack.api as a, kvsmith.pipeline; print(a.__file__)"
    path = f"import sys; sys.path.insert(0, '.'); {program}"
    done = _python("-c", path, cwd=tmp_path / "installed")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


@pytest.mark.slow
def test_mypy_checks_the_files_behind_the_links(tmp_path: Path) -> None:
    for name in ("kvsmith", *LINKS):
        (tmp_path / name).mkdir()
    for name in LINKS:
        (tmp_path / "kvsmith" / name).symlink_to(Path("..") / name)
    (tmp_path / "kernels" / "op").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    untyped, wrong = "def f(x):\n    return x\n", "x: int = 'a'\n"
    for name in ("kvsmith/__init__.py", "kernels/op/__init__.py", "pipeline/__init__.py"):
        (tmp_path / name).write_text(untyped + wrong)
    done = _python("-m", "mypy", "-p", "kvsmith", "--cache-dir", str(tmp_path), cwd=tmp_path)
    found = re.findall(r"^(\S+):\d+: error: .*\[(\S+)\]$", done.stdout, re.MULTILINE)
    assert sorted(found) == [
        ("kvsmith/__init__.py", "assignment"),
        ("kvsmith/__init__.py", "no-untyped-def"),
        ("kvsmith/kernels/op/__init__.py", "assignment"),
        ("kvsmith/kernels/op/__init__.py", "no-untyped-def"),
        ("kvsmith/pipeline/__init__.py", "assignment"),
    ], done.stdout


def test_every_target_sets_up_first() -> None:
    make = shutil.which("make")
    # A dry run still runs the lines that call make again.
    assert make and "$(MAKE)" not in (ROOT / "Makefile").read_text()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    for target in ("demo", "test", "check", "bench"):
        command = [make, "-n", "-B", target, "STAMP=stamp"]
        done = subprocess.run(
            command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        first = next(i for i, line in enumerate(lines) if "-m venv" in line)
        run = [i for i, line in enumerate(lines) if re.search(r"-m (pytest|mypy|kvsmith)", line)]
        assert run and first < min(run), done.stdout


def test_ci_entry_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_ruff_refuses_the_names_that_would_break_transformers(tmp_path: Path) -> None:
    banned = ["import kernels.pack", "from pipeline import data", "import pickle"]
    banned += ["from torch import load", "from .strict import from_dict", "print(1)"]
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for number, line in enumerate(banned):
        (tmp_path / f"f{number}.py").write_text(line + "\n")
    done = _python(
        "-m", "ruff", "check", "--no-cache", "--output-format=concise", ".", cwd=tmp_path
    )
    for number in range(len(banned)):
        assert re.search(rf"^f{number}\.py:.* (TID25[12]|T201) ", done.stdout, re.MULTILINE)


def test_one_version() -> None:
    from kvsmith import __version__

    assert _project()["project"]["version"] == __version__
