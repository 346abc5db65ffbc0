"""The bundle on disk: whole or absent, never through links, never over what is not a bundle."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

import kvsmith
from kvsmith.bundle import Bundle, BundleError
from kvsmith.bundle import folder as folder_module
from kvsmith.bundle.manifest import CARD, MANIFEST, SHARD
from kvsmith.spec import CacheSpec
from tests.golden import (
    GOLDEN,
    INT4,
    contents,
    copy_golden,
    golden_base,
    golden_bundle,
    golden_spec,
    refusal,
)


def test_links_and_special_files_are_not_followed(tmp_path: Path) -> None:
    for i, name in enumerate((SHARD, MANIFEST, CARD)):
        folder = copy_golden(tmp_path / f"link{i}")
        (folder / name).unlink()
        (folder / name).symlink_to(GOLDEN / name)
        assert "a regular file, got a symbolic link" in refusal(lambda f=folder: kvsmith.load(f))
    folder = copy_golden(tmp_path / "fifo")
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)
    assert "regular file" in refusal(lambda: kvsmith.load(folder))
    (folder / SHARD).unlink()
    (folder / SHARD).mkdir()
    assert "regular file" in refusal(lambda: kvsmith.load(folder))


def test_unlisted_files_are_not_opened(tmp_path: Path) -> None:
    folder = copy_golden(tmp_path / "b")
    os.mkfifo(folder / "extra.safetensors")
    (folder / "model.py").write_text("raise SystemExit")
    assert kvsmith.load(folder).spec == golden_spec()


def test_saving_the_same_again_changes_nothing(tmp_path: Path) -> None:
    bundle = golden_bundle()
    folder = bundle.save_pretrained(tmp_path / "b")
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.iterdir()}
    bundle.save_pretrained(folder)
    assert {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["b"]


def test_other_content_is_replaced_only_when_asked(tmp_path: Path) -> None:
    folder = golden_bundle().save_pretrained(tmp_path / "b")
    other = Bundle.create(CacheSpec.parse(INT4), {}, golden_base())
    assert "Remove it or choose another" in refusal(lambda: other.save_pretrained(folder))
    assert kvsmith.load(folder).spec == golden_spec()
    other.save_pretrained(folder, overwrite=True)
    assert kvsmith.load(folder).spec == other.spec
    assert os.listdir(tmp_path) == ["b"] and SHARD not in os.listdir(folder)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_bundle_is_never_replaced(overwrite: bool, tmp_path: Path) -> None:
    (mine := tmp_path / "mine").mkdir()
    (mine / "thesis.tex").write_text("x")
    save = lambda path: refusal(lambda: golden_bundle().save_pretrained(path, overwrite))  # noqa: E731
    assert "other content" in save(mine)
    assert (mine / "thesis.tex").read_text() == "x"
    assert "a file or link" in save(mine / "thesis.tex")
    (tmp_path / "link").symlink_to(mine)
    assert "a file or link" in save(tmp_path / "link")
    (tmp_path / "empty").mkdir()
    golden_bundle().save_pretrained(tmp_path / "empty" / "deeper" / "b", overwrite)
    golden_bundle().save_pretrained(tmp_path / "empty" / "deeper" / "b", overwrite)


def test_a_damaged_bundle_is_written_again(tmp_path: Path) -> None:
    folder = copy_golden(tmp_path / "b")
    (folder / SHARD).write_bytes(b"short")
    kvsmith.load(GOLDEN).save_pretrained(folder, overwrite=True)
    assert contents(folder) == contents(GOLDEN)


@pytest.mark.parametrize("step", range(6))
def test_a_writer_that_fails_leaves_what_was_there(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Bundle.create(CacheSpec.parse(INT4), {}, golden_base())
    old.save_pretrained(tmp_path / "old")
    left, sync, rename = [step], os.fsync, Path.rename

    def fail() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", lambda fd: (fail(), sync(fd)))
    monkeypatch.setattr(Path, "rename", lambda a, b: (fail(), rename(a, b)))
    with pytest.raises((OSError, BundleError)):
        golden_bundle().save_pretrained(tmp_path / "new")
    left[0] = step
    with pytest.raises((OSError, BundleError)):
        golden_bundle().save_pretrained(tmp_path / "old", overwrite=True)
    monkeypatch.undo()
    for name in os.listdir(tmp_path):
        if not name.startswith("."):
            kvsmith.load(tmp_path / name)


def test_what_killed_writers_left_is_cleaned_up(tmp_path: Path) -> None:
    names = (".b.tmp-1", ".b.tmp-2", ".c.tmp-3", ".b.tmp-4")
    stale, young, foreign, future = (tmp_path / n for n in names)
    for path in (stale, young, foreign, future):
        path.mkdir()
        (path / SHARD).write_bytes(b"half")
    past = time.time() - 2 * folder_module.STALE_SECONDS
    for path in (stale, foreign):
        os.utime(path, (past, past))
    later = time.time() + 2 * folder_module.STALE_SECONDS
    os.utime(future, (later, later))  # the clock went back
    golden_bundle().save_pretrained(tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == [".b.tmp-2", ".c.tmp-3", "b"]


def test_another_writer_of_the_same_content_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def late(source: Path, target: Path) -> Path:
        if not target.exists():
            shutil.copytree(GOLDEN, target)
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", late)
    kvsmith.load(GOLDEN).save_pretrained(tmp_path / "b")
    assert os.listdir(tmp_path) == ["b"] and contents(tmp_path / "b") == contents(GOLDEN)
    other = Bundle.create(CacheSpec.parse(INT4), {}, golden_base())
    assert "replaceable" in refusal(lambda: other.save_pretrained(tmp_path / "c"))
    assert contents(tmp_path / "c") == contents(GOLDEN)
