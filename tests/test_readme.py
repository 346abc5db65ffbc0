"""Every command of the README runs, in a clone, as it stands there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.S)
# Minutes to half an hour: these run the same way on less.
SLOW = {"train.py", "evaluate.py", "target_bits=3.0"}
SCRIPTS = {"calibrate.py", "export.py", "evaluate.py", "plan.py", "train.py"}


def commands():
    """Command lines of the shell blocks and of `...` in the text, without comments."""
    lines = [line for kind, body in BLOCKS if kind == "sh" for line in body.splitlines()]
    lines += re.findall(r"`((?:\.venv/bin/python|make) [^`]+)`", README)
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = {c[1] for c in commands() if c[0] == "make"}
    assert {"demo", "test"} <= named <= targets


def test_links_and_folders_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"\| `(\w+/)` \|", README):
        assert (ROOT / target).exists(), target
    assert len(README.splitlines()) <= 150


@pytest.mark.slow
def test_every_command_runs_and_the_code_too(tmp_path, tiny_model_dir):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    changed = subprocess.run(
        ["git", "diff", "--name-only", "--diff-filter=d", "HEAD"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    for name in changed:
        (clone / name).write_bytes((ROOT / name).read_bytes())
    # The installed package would find the original's files; here every import is the clone's.
    env = {**os.environ, "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}
    scripts = [c[1:] for c in commands() if c[0] == ".venv/bin/python"]
    assert {c[0] for c in scripts} == SCRIPTS
    for script in scripts:
        extra = ["debug=smoke"] if SLOW.intersection(script) else []
        done = subprocess.run(
            [sys.executable, *script, *extra], cwd=clone, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{' '.join(script)}\n{done.stdout}\n{done.stderr}"
    code = next(body for kind, body in BLOCKS if kind == "python")
    (bundle,) = (clone / "artifacts" / "bundles" / "tiny").glob("nuq3_o1-*")
    setting = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = {str(clone / "artifacts/models/tiny")!r}
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = AutoTokenizer.from_pretrained(folder)("Return a list of", return_tensors="pt")
inputs.pop("token_type_ids", None)
bundle_dir = {str(bundle)!r}
"""
    done = subprocess.run(
        [sys.executable, "-c", setting + code], cwd=clone, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    used, bits = done.stdout.split()
    assert int(used) > 0 and float(bits) > 0
