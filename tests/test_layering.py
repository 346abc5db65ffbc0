"""Imports run one way, kernels <- kvsmith <- pipeline <- scripts, and heavy packages stay in place.

The imports are read from the source by ast, those inside functions and `import_module("name")` too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("calibrate", "train", "export", "evaluate", "plan", "report")
TRITON_FILES = r"kernels/\w+/triton\.py|kernels/(bench|aot)\w*\.py"
# Times whole models: an entry point that uses the runtime, imported by nothing at its top.
BENCH_FILE = r"kernels/bench_model\.py"

# Layer -> what it may import of this project.
MAY_IMPORT = {
    "kernels": r"kvsmith\.(kernels|errors)\b.*",
    "bench": r"kvsmith(?!\.(pipeline|conf)\b).*",
    "kvsmith": r"kvsmith(?!\.(pipeline|conf)\b).*",
    "pipeline": r"kvsmith.*",
    "scripts": r"kvsmith.*",
}
# Package -> the files that may import it.
ONLY_IN = {
    "triton": TRITON_FILES,
    "transformers": rf"kvsmith/hf/.*|pipeline/.*|{BENCH_FILE}",
    "scipy": r"pipeline/.*",
    "sklearn": r"pipeline/.*",
    "datasets": r"pipeline/.*",
    "accelerate": r"pipeline/.*",
    "peft": r"pipeline/training/lora\.py",
    "wandb": r"pipeline/log\.py",
    "hydra": r"pipeline/config\.py|\w+\.py",
    "omegaconf": r"pipeline/config\.py|\w+\.py",
}
HEAVY = ["hydra", "omegaconf", "scipy", "sklearn", "datasets", "accelerate"]
HEAVY += ["wandb", "triton", "matplotlib", "rich"]
# huggingface_hub comes with transformers.
RUNTIME = {"torch", "transformers", "safetensors", "huggingface_hub", "triton", "kvsmith"}


class Import(NamedTuple):
    """`name` is the module, or module.attribute for `from module import attribute`."""

    name: str
    line: int
    lazy: bool


def imports(source: str) -> Iterator[Import]:
    """Every import of a file; `lazy` where it runs only when a function is called."""
    stack = [(node, False) for node in ast.parse(source).body]
    while stack:
        node, lazy = stack.pop()
        for name in _imported(node):
            yield Import(name, getattr(node, "lineno", 0), lazy)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        stack += [(child, inside) for child in ast.iter_child_nodes(node)]


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        function = ast.unparse(node.func).split(".")[-1]
        return [str(node.args[0].value)] if function in ("import_module", "__import__") else []
    return []


def layer_of(path: str) -> str:
    if re.fullmatch(BENCH_FILE, path):
        return "bench"
    top = path.split("/")[0]
    return top if top in ("kernels", "kvsmith", "pipeline", "tests") else "scripts"


def violations(path: str, source: str) -> list[str]:
    """Rules that the file breaks, each as `path:line: sentence`."""
    layer = layer_of(path)
    return [
        f"{path}:{found.line}: {found.name} {rule}"
        for found in imports(source)
        for rule in _broken(path, layer, found)
    ]


def _broken(path: str, layer: str, found: Import) -> Iterator[str]:
    top = found.name.split(".")[0]
    if found.name.startswith("."):
        yield "must be an absolute import"
        return
    if top in ("kernels", "pipeline", "conf"):
        yield f"must be imported as kvsmith.{top}"
    if path.startswith("tests/oracles/") and re.match(r"kvsmith|tests\.(?!oracles\b)", found.name):
        yield "must not be imported by an oracle"
    if layer == "tests":
        return
    # `kvsmith.plan` and its like are doors to the factory, opened when they are called.
    door = path == "kvsmith/__init__.py" and found.lazy
    allowed = MAY_IMPORT["pipeline" if door else layer]
    if top in SCRIPTS or (top == "kvsmith" and not re.fullmatch(allowed, found.name)):
        yield f"must not be imported by {layer}"
    if not re.fullmatch(ONLY_IN.get(top, ".*"), path):
        yield f"must be imported only in {ONLY_IN[top]}"
    if layer in ("kernels", "kvsmith", "bench") and top not in RUNTIME | sys.stdlib_module_names:
        yield "must not be needed by the runtime"
    if path == "kvsmith/errors.py" and top not in sys.stdlib_module_names:
        yield "must not be imported by the one module that all layers share"
    yield from _broken_by_kernels(path, found)


def _broken_by_kernels(path: str, found: Import) -> Iterator[str]:
    triton_file = re.fullmatch(TRITON_FILES, path)
    if re.match(r"kvsmith\.kernels\.\w+\.triton\b", found.name) and not (found.lazy or triton_file):
        yield "must be imported inside a function"
    if found.name.startswith("kvsmith.kernels.bench_model") and not found.lazy:
        yield "must be imported inside a function"
    if re.fullmatch(r"kernels/\w+/triton\.py", path) and re.search(r"\.reference\b", found.name):
        yield "must not be imported: a kernel does not know its reference"


def sources() -> list[Path]:
    """All Python files; the links inside kvsmith/ are not followed."""
    folders = ("kernels", "kvsmith", "pipeline", "tests")
    files = [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]
    links = [p for p in (ROOT / "kvsmith").iterdir() if p.is_symlink()]
    own = [p for p in files if not any(link in p.parents for link in links)]
    return [*sorted(ROOT.glob("*.py")), *own]


def test_the_tree_is_layered() -> None:
    found = sources()
    for folder in ("kernels", "kvsmith", "pipeline", "tests"):
        assert any(p.relative_to(ROOT).parts[0] == folder for p in found)
    broken = [v for p in found for v in violations(p.relative_to(ROOT).as_posix(), p.read_text())]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/pack/api.py", "from kvsmith.spec import CacheSpec"),
        ("kernels/pack/api.py", "import kvsmith"),
        ("kernels/pack/api.py", "def f():\n    from kvsmith import cache"),
        ("kernels/pack/api.py", "import triton"),
        ("kernels/pack/api.py", "def f():\n    import triton.language as tl"),
        ("kernels/pack/api.py", "from kvsmith.kernels.pack import triton"),
        ("kernels/pack/api.py", "from kvsmith.kernels.pack.triton import pack"),
        ("kernels/pack/api.py", "import numpy"),
        ("kernels/bench.py", "import transformers"),
        ("kernels/bench.py", "from kvsmith.hf import make_cache"),
        ("kernels/bench.py", "from kvsmith.kernels.bench_model import fill"),
        ("kernels/bench_model.py", "from kvsmith.pipeline import data"),
        ("kernels/bench_model.py", "import sklearn"),
        ("kernels/pack/triton.py", "from kvsmith.kernels.pack import reference"),
        ("kernels/pack/triton.py", "def f():\n    from kvsmith.kernels.pack.reference import pack"),
        ("kvsmith/cache.py", "from kvsmith.pipeline import data"),
        ("kvsmith/cache.py", "class A:\n    import kvsmith.pipeline.data"),
        ("kvsmith/cache.py", "from kvsmith import pipeline"),
        ("kvsmith/cache.py", "def f():\n    from kvsmith.pipeline import data"),
        ("kvsmith/__init__.py", "from kvsmith.pipeline import data"),
        ("kvsmith/cache.py", "import transformers"),
        (
            "kvsmith/cache.py",
            "import importlib\nm = importlib.import_module('transformers.cache_utils')",
        ),
        ("kvsmith/hfs.py", "import transformers"),
        ("kvsmith/cache.py", "if TYPE_CHECKING:\n    from transformers import Cache"),
        ("kvsmith/cache.py", "def f():\n    import rich"),
        ("kvsmith/cache.py", "from .spec import CacheSpec"),
        ("kvsmith/cache.py", "from hydra import compose"),
        ("kvsmith/hf/cache.py", "__import__('accelerate')"),
        ("kvsmith/errors.py", "import torch"),
        ("kvsmith/errors.py", "from kvsmith import strict"),
        ("pipeline/fit/nuq.py", "import hydra"),
        ("pipeline/fit/nuq.py", "from omegaconf import OmegaConf"),
        ("pipeline/fit/nuq.py", "import wandb"),
        ("pipeline/fit/nuq.py", "from pipeline import data"),
        ("pipeline/fit/nuq.py", "import kernels.pack"),
        ("pipeline/fit/nuq.py", "from calibrate import main"),
        ("calibrate.py", "import train"),
        ("calibrate.py", "from transformers import AutoModel"),
        ("calibrate.py", "from sklearn.cluster import KMeans"),
        ("calibrate.py", "import datasets"),
        ("tests/test_pack.py", "import kernels"),
        ("tests/oracles/kvquant.py", "from kvsmith.spec import CacheSpec"),
        ("tests/oracles/kvquant.py", "from tests.conftest import ROOT"),
    ],
)
def test_every_rule_can_fail(path: str, source: str) -> None:
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/pack/api.py", "import torch\nfrom kvsmith.kernels.pack import reference"),
        ("kernels/pack/api.py", "def f():\n    from kvsmith.kernels.pack import triton"),
        ("kernels/pack/api.py", "from kvsmith.errors import explain"),
        ("kernels/pack/triton.py", "import triton\nfrom kvsmith.kernels.common.triton import load"),
        ("kernels/bench.py", "import triton"),
        ("kernels/bench_model.py", "import transformers\nfrom kvsmith.hf import make_cache"),
        (
            "kvsmith/hf/cache.py",
            "from transformers import Cache\nfrom kvsmith.cache import ModelCache",
        ),
        ("kvsmith/hf/seam.py", "from transformers import AttentionInterface"),
        ("kvsmith/__init__.py", "def f():\n    from kvsmith.pipeline import data"),
        ("kvsmith/bundle.py", "import json, os\nfrom safetensors.torch import save_file"),
        ("pipeline/config.py", "from omegaconf import OmegaConf\nimport hydra"),
        ("pipeline/log.py", "def f():\n    import wandb"),
        ("pipeline/fit/nuq.py", "import numpy, sklearn.cluster, transformers\nimport kvsmith.spec"),
        ("calibrate.py", "import hydra\nfrom kvsmith.pipeline.calibrate import run"),
        ("tests/oracles/kvquant.py", "import numpy\nfrom tests.oracles import quantile"),
        ("tests/test_pack.py", "import triton, kvsmith, sklearn"),
    ],
)
def test_no_rule_forbids_too_much(path: str, source: str) -> None:
    assert violations(path, source) == []


def _fresh(program: str) -> str:
    run = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_kvsmith_is_light() -> None:
    program = f"import kvsmith, sys; sys.stdout.write(' '.join(set({HEAVY}) & set(sys.modules)))"
    assert _fresh(program) == ""


# Every finder is wrapped, so that the packages look uninstalled to transformers as well.
HIDE = f"""
import importlib, sys
class Hidden:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in {HEAVY}
        return None if hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
"""


def test_the_runtime_works_without_the_factory_s_packages() -> None:
    with pytest.raises(AssertionError, match="No module named 'sklearn'"):
        _fresh(HIDE + "import sklearn")
    paths = [p.relative_to(ROOT) for p in sources()]
    modules = [
        ".".join(("kvsmith.kernels" if p.parts[0] == "kernels" else "kvsmith", *p.parts[1:]))
        for p in (path.with_suffix("") for path in paths)
        if p.parts[0] in ("kernels", "kvsmith") and p.name not in ("triton", "__init__", "__main__")
    ]
    _fresh(f"{HIDE}for name in {modules}: importlib.import_module(name)")
