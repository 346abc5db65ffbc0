"""Rules that a reader of the source can check, checked: what packages may call, sizes, folders."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "kvsmith", "pipeline")
MAX_LINES = 400  # the aim is 250
MAX_BYTES = 10 * 2**20

FORBIDDEN_CALLS = {"print", "eval", "exec", "compile", "breakpoint"}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_FUNCTIONS = {"torch.load", "torch.save"}
# Remote code is off, or what the configuration says, which is passed on in one place.
CONFIGURED = "cfg.trust_remote_code"
TRUSTED = ("False", "None", CONFIGURED)
MACHINE_PATH = re.compile(r"(?<![\w.~$}>-])/(?:work|root|home|Users|opt|mnt|srv|scratch)/\w")


def forbidden(source: str) -> Iterator[str]:
    """What no package may do, as `line: what`."""
    for node in ast.walk(ast.parse(source)):
        for what in _forbidden(node):
            yield f"{getattr(node, 'lineno', 0)}: {what}"


def _forbidden(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        module = getattr(node, "module", None) or ""
        names = [f"{module}.{a.name}".lstrip(".") for a in node.names]
        return [
            n for n in names if n.split(".")[0] in FORBIDDEN_MODULES or n in FORBIDDEN_FUNCTIONS
        ]
    if isinstance(node, ast.Attribute):
        return [ast.unparse(node)] if ast.unparse(node) in FORBIDDEN_FUNCTIONS else []
    if not isinstance(node, ast.Call):
        return []
    if isinstance(node.func, ast.Name):
        found = [node.func.id] if node.func.id in FORBIDDEN_CALLS else []
    else:
        found = [".cuda()"] if getattr(node.func, "attr", "") == "cuda" else []
    trusting = [k for k in node.keywords if k.arg == "trust_remote_code"]
    return found + ["trust_remote_code" for k in trusting if ast.unparse(k.value) not in TRUSTED]


def tracked() -> list[Path]:
    """Files that git tracks, deleted ones and links left out."""
    # A checkout that another user owns is still this checkout.
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z"]
    names = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split("\0")
    paths = [ROOT / name for name in names if name]
    return [p for p in paths if p.is_file() and not p.is_symlink()]


def op_folders(kernels: Path) -> list[Path]:
    return sorted(p for p in kernels.iterdir() if p.is_dir() and p.name != "__pycache__")


def missing_parts(op: Path, tests: Path) -> list[str]:
    """What an op folder lacks of api.py, reference.py and a test."""
    lacking = [name for name in ("api.py", "reference.py") if not (op / name).is_file()]
    has_test = any(tests.glob(f"test_{op.name}*.py")) or any((tests / op.name).glob("test_*.py"))
    return lacking if has_test else [*lacking, f"tests/kernels/test_{op.name}.py"]


def too_long(path: Path) -> bool:
    return len(path.read_text().splitlines()) > MAX_LINES


def python_files() -> list[Path]:
    found = [p for p in tracked() if p.suffix == ".py"]
    assert len(found) > 10
    return found


def test_packages_call_nothing_forbidden() -> None:
    files = [p for p in python_files() if p.relative_to(ROOT).parts[0] in PACKAGES]
    broken = [f"{p.relative_to(ROOT)}:{what}" for p in files for what in forbidden(p.read_text())]
    assert not broken, "\n".join(broken)


def test_remote_code_is_decided_in_one_place() -> None:
    places = [p for p in python_files() if f"trust_remote_code={CONFIGURED}" in p.read_text()]
    assert [p.relative_to(ROOT).as_posix() for p in places] == ["pipeline/model.py"]
    assert places[0].read_text().count(CONFIGURED) == 1
    assert "trust_remote_code: bool = False\n" in places[0].read_text()


@pytest.mark.parametrize(
    "source",
    [
        "print('x')",
        "def f():\n    eval('1')",
        "exec(code)",
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle as j",
        "x = torch.load(path)",
        "read = torch.load",
        "from torch import save",
        "model.cuda()",
        "model.layer[0].weight.cuda(non_blocking=True)",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
    ],
)
def test_each_call_rule_can_fail(source: str) -> None:
    assert list(forbidden(source))


def test_call_rules_leave_the_rest_alone() -> None:
    source = (
        "model.eval()\nre.compile('x')\nload_file(p)\nf(trust_remote_code=False)\ntorch.cuda.x()"
    )
    assert list(forbidden(source)) == []


def test_no_tracked_file_is_large() -> None:
    large = [str(p.relative_to(ROOT)) for p in tracked() if p.stat().st_size > MAX_BYTES]
    assert not large


def test_no_tracked_text_names_a_place_on_one_machine() -> None:
    broken = []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" in data[:8192] or path.suffix == ".safetensors":
            continue
        for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
            if MACHINE_PATH.search(line):
                broken.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not broken, "\n".join(broken)


def test_the_path_rule_can_fail() -> None:
    for place in ("work/main", "root/x", "home/ann/x", "Users/ann", "opt/wheels"):
        assert MACHINE_PATH.search(f'path = "/{place}"')
    for text in ("https://example.org/opt/x", "~/home/x", "a/work/b", "$HOME/work/x", "/tmp/x"):
        assert not MACHINE_PATH.search(text)


def test_every_op_has_api_reference_and_test() -> None:
    ops = op_folders(ROOT / "kernels")
    lacking = {op.name: missing_parts(op, ROOT / "tests" / "kernels") for op in ops}
    assert ops and not any(lacking.values()), lacking


def test_the_op_rule_can_fail(tmp_path: Path) -> None:
    (op := tmp_path / "pack").mkdir()
    assert missing_parts(op, tmp_path) == ["api.py", "reference.py", "tests/kernels/test_pack.py"]
    for name in ("pack/api.py", "pack/reference.py", "test_pack_shapes.py"):
        (tmp_path / name).touch()
    assert missing_parts(op, tmp_path) == []


def test_files_stay_short(tmp_path: Path) -> None:
    assert not [str(p.relative_to(ROOT)) for p in python_files() if too_long(p)]
    (tmp_path / "long.py").write_text("x\n" * (MAX_LINES + 1))
    assert too_long(tmp_path / "long.py")
