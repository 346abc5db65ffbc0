"""Files of a bundle on disk: read without following links, written whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from kvsmith.bundle.errors import refuse
from kvsmith.errors import explain

STALE_SECONDS = 3600.0
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_CLOEXEC", 0)
)


def open_file(folder: Path, name: str, links_into: Path | None = None) -> BinaryIO:
    """Open a regular file of the folder for reading.

    Args:
        folder: the bundle.
        name: a plain name, checked before.
        links_into: the one folder that links may lead into (the hub's cache keeps files as links);
            None refuses links.

    Returns:
        An open binary file.

    Raises:
        BundleError: no such file, a link, or something that is not a file.
    """
    path = folder / name
    remedy = "Copy the file itself into the folder."
    if path.is_symlink():
        target = Path(os.path.realpath(path))  # Path.resolve raises where links go in circles
        if links_into is None or not target.is_relative_to(os.path.realpath(links_into)):
            raise refuse(str(path), "file", "a regular file", "a symbolic link", remedy)
        path = target
    try:
        descriptor = os.open(path, _FLAGS)
    except FileNotFoundError:
        remedy = "Copy or export the bundle again."
        raise refuse(str(path), "file", "present", "nothing", remedy) from None
    except OSError as error:
        reason = f"({error.strerror})"
        raise refuse(str(path), "file", "a readable regular file", reason) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise refuse(str(path), "file", "a regular file", "something else", remedy)
    return os.fdopen(descriptor, "rb")


def file_size(file: BinaryIO) -> int:
    """Bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def write_folder(target: Path, files: Mapping[str, bytes], overwrite: bool) -> None:
    """Make `target` hold exactly `files`; at every moment it is whole, absent, or as it was.

    Args:
        target: folder; nothing happens where it already holds these bytes.
        files: name -> content.
        overwrite: replace a folder that holds other content. It must look like an older bundle:
            plain files whose names the new one could have.

    Raises:
        BundleError: the target exists with other content and may not be replaced.
        OSError: the disk refuses; one line.
    """
    target = target.absolute()
    if holds(target, files):
        return
    _check_replaceable(target, overwrite)
    temporary = _temporary(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        temporary.mkdir()
        for name, data in files.items():
            _write_synced(temporary / name, data)
        _sync_folder(temporary)
        _swap(temporary, target, files)
        _sync_folder(target.parent)
    except OSError as error:
        remedy = "Make room or choose another folder."
        text = explain(str(target), "folder", "writable", f"({error.strerror})", remedy)
        raise OSError(text) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def holds(folder: Path, files: Mapping[str, bytes]) -> bool:
    """Whether the folder holds exactly these files with these bytes."""
    if not folder.is_dir() or {p.name for p in folder.iterdir()} != files.keys():
        return False
    paths = [folder / name for name in files]
    if any(p.is_symlink() or not p.is_file() for p in paths):
        return False
    return all(p.stat().st_size == len(files[p.name]) for p in paths) and all(
        p.read_bytes() == files[p.name] for p in paths
    )


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise refuse(str(target), "target", "a folder", "a file or link", "Choose another name.")
    names = {p.name for p in target.iterdir()}
    if not names:
        return
    ours = all(n in ("manifest.json", "README.md") or n.endswith(".safetensors") for n in names)
    if overwrite and ours and "manifest.json" in names:
        return
    remedy = "Remove it or choose another name."
    raise refuse(
        str(target), "target", "new, empty or equal", "a folder with other content", remedy
    )


def _temporary(target: Path) -> Path:
    return target.parent / f".{target.name}.tmp-{uuid.uuid4().hex}"


def _remove_stale(target: Path) -> None:
    """Delete what writers that were killed left beside the target; a living one is younger.

    A folder from the future, left before the clock was set back, counts as old too.
    """
    prefix = f".{target.name}.tmp-"
    for path in [p for p in target.parent.iterdir() if p.name.startswith(prefix)]:
        try:
            if abs(time.time() - path.stat().st_mtime) > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:  # gone meanwhile
            continue


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(temporary: Path, target: Path, files: Mapping[str, bytes]) -> None:
    old = _temporary(target)
    if target.is_dir() and any(target.iterdir()):
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError as error:
        if old.exists() and not target.exists():
            old.rename(target)
        # Where another writer came first it is fine if it wrote the same.
        if not holds(target, files):
            reason = f"({error.strerror})"
            raise refuse(str(target), "folder", "replaceable", reason, "Try again.") from None
    shutil.rmtree(old, ignore_errors=True)
