"""A stage is `name, reads, writes, run`, keyed by the hash of its configuration and of what it
reads.

A finished stage leaves a marker, `.stages/<name>.json`, with its key and the hashes of what it
wrote; it is skipped as long as all of that still holds. Every file is written beside its place and
renamed, so it is whole or absent, and the same content always gives the same bytes. One folder is
worked on by one process at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from kvsmith.errors import explain
from kvsmith.strict import to_dict

TEMPORARY = ".tmp"


@dataclass(frozen=True)
class Stage:
    """A step whose result is files.

    Attributes:
        name: file name of the marker; unique in the folder.
        reads: files whose content the result depends on, absolute.
        writes: files that `run` leaves, relative to the folder.
        run: does the work.
        config: everything else the result depends on; a dataclass or plain data.
    """

    name: str
    reads: tuple[Path, ...]
    writes: tuple[str, ...]
    run: Callable[[], None]
    config: Any = field(default_factory=dict)

    def key(self) -> str:
        """SHA-256 of the configuration and of the content of `reads`."""
        reads = [file_hash(path) for path in self.reads]
        return digest({"config": to_dict(self.config), "reads": reads, "writes": list(self.writes)})


def run_stage(stage: Stage, folder: Path) -> bool:
    """Run a stage unless it is finished.

    Args:
        stage: the step.
        folder: where `writes` and the marker live.

    Returns:
        True if it ran, False if it was finished before.
    """
    key = stage.key()
    if is_finished(stage, folder, key):
        return False
    stage.run()
    files = {
        name: {"sha256": file_hash(folder / name), "size": (folder / name).stat().st_size}
        for name in stage.writes
    }
    write_json(_marker(stage, folder), {"key": key, "files": files})
    return True


def is_finished(stage: Stage, folder: Path, key: str | None = None) -> bool:
    """Whether the stage's marker fits its key, and its files are as they were written."""
    marker = _marker(stage, folder)
    if not marker.is_file():
        return False
    try:
        found = read_json(marker)
        files = found["files"]
        if found["key"] != (key or stage.key()) or set(files) != set(stage.writes):
            return False
        return all(_unchanged(folder / name, facts) for name, facts in files.items())
    except (ValueError, KeyError, TypeError):
        return False  # a damaged marker: the work is done again


def check_written(name: str, folder: Path, file: str) -> None:
    """Refuse a file that is not as the stage `name` left it.

    Args:
        name: of the stage.
        folder: as of `run_stage`.
        file: one of the stage's `writes`.

    Raises:
        ValueError: the file was changed, cut or exchanged.
    """
    marker = folder / ".stages" / f"{name}.json"
    if not marker.is_file():
        return  # not finished: whoever reads it looks at its content
    facts = read_json(marker).get("files", {}).get(file)
    if facts is None or not _unchanged(folder / file, facts):
        remedy = "Run calibrate.py again, which makes it anew."
        raise ValueError(explain(str(folder / file), "file", "as written", "changed", remedy))


def _marker(stage: Stage, folder: Path) -> Path:
    return folder / ".stages" / f"{stage.name}.json"


def _unchanged(path: Path, facts: Mapping[str, Any]) -> bool:
    return (
        path.is_file()
        and path.stat().st_size == facts["size"]
        and file_hash(path) == facts["sha256"]
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Work alone in `folder` (made if absent); removes what interrupted writers left.

    The lock belongs to the open file, so it ends with the process however that ends.

    Raises:
        ValueError: another process holds the folder.
        OSError: nothing can be written there; one line.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        remedy = "Choose another folder."
        text = explain(str(folder), "folder", "writable", f"({error.strerror})", remedy)
        raise OSError(text) from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            remedy = "Wait for it, or stop it."
            raise ValueError(
                explain(str(folder), "folder", "free", "in use by another run", remedy)
            ) from error
        for leftover in sorted(folder.rglob(f".*{TEMPORARY}")):
            leftover.unlink(missing_ok=True)
        yield


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; its folder is made if absent.

    Raises:
        OSError: the disk refuses; one line.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_name(path.parent)
    except OSError as error:
        remedy = "Make room or choose another folder; the same command then goes on."
        text = explain(str(path), "file", "writable", f"({error.strerror})", remedy)
        raise OSError(text) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_name(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, data: object) -> None:
    """Write plain data or a dataclass as JSON with sorted keys."""
    text = json.dumps(to_dict(data), indent=2, sort_keys=True, allow_nan=False)
    atomic_write(path, f"{text}\n".encode())


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: the file is not JSON; one line.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        remedy = "Delete the file and run again."
        raise ValueError(explain(str(path), "file", "JSON", f"broken ({error})", remedy)) from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors; the same tensors give the same bytes."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    atomic_write(path, safetensors.torch.save(whole))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged; one line.
    """
    if not path.is_file():
        raise FileNotFoundError(explain(str(path), "file", "present", "nothing"))
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        remedy = "Delete the file and run again."
        raise ValueError(
            explain(str(path), "file", "whole safetensors", f"({error})", remedy)
        ) from error


def file_hash(path: Path) -> str:
    """SHA-256 (hexadecimal) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(data: object) -> str:
    """SHA-256 (hexadecimal) of plain data, by its canonical JSON."""
    text = json.dumps(to_dict(data), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Stop:
    """Lets a loop end at a safe point when the process is asked to terminate; a context manager.

    Within it SIGTERM only sets `asked`. Outside the main thread, where signals cannot be caught,
    it does nothing.
    """

    EXIT_CODE = 128 + signal.SIGTERM

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def leave_if_asked(self) -> None:
        """End the process with 143 if SIGTERM came.

        Raises:
            SystemExit: it came.
        """
        if self.asked:
            raise SystemExit(self.EXIT_CODE)
