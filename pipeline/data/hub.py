"""`data=wikitext2`, `data=c4`, `data=pg19`: texts of the Hugging Face hub, through `datasets`.

Each takes named files of one commit. Where HF_HUB_OFFLINE is set they come from the hub's cache
below HF_HOME; a folder in place of the hub's name holds a copy of them. Held-out text is the
dataset's own; its training text is divided by the content of whole documents into calibration and
the rest, so the two have none in common.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvsmith.errors import explain
from kvsmith.pipeline.config import input_path
from kvsmith.pipeline.data.split import Split, split_of

# A title of WikiText: one equals sign on each side; sections have more.
TITLE = re.compile(r"\s*= (?!=)[^\n]*[^=\s] =\s*")


@dataclass(frozen=True)
class HubData:
    """A dataset of the hub, or a local folder laid out like it.

    Args:
        path: hub name `owner/name`, or a folder.
        revision: commit, tag or branch of the hub; None is its main branch.
        train: pattern of the files that calibration and training read.
        heldout: pattern of the files that evaluation reads.
        field: column that holds the text.
        documents: a row is a document, or rows are the lines of Wikipedia articles (WikiText).
        streaming: read from the network as far as needed; False downloads the files first.
    """

    kind: Literal["hub"] = "hub"
    path: str = ""
    revision: str | None = None
    train: str = ""
    heldout: str = ""
    field: str = "text"
    documents: Literal["rows", "articles"] = "rows"
    streaming: bool = True

    def __post_init__(self) -> None:
        for name in ("path", "train", "heldout"):
            if not getattr(self, name):
                raise ValueError(explain(f"data.{name}", "value", "given", "nothing"))


def hub_documents(cfg: HubData, split: Split) -> Iterator[str]:
    """Stream the documents of one split, whole and in the order of the files.

    Raises:
        ValueError: the dataset cannot be read, or has no such column; says how to get it.
    """
    heldout = split == "heldout"
    rows = _rows(cfg, cfg.heldout if heldout else cfg.train)
    for text in articles(rows) if cfg.documents == "articles" else rows:
        if heldout or (split_of(text) == "calibration") == (split == "calibration"):
            yield text


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Join the lines of WikiText to articles; a title begins one."""
    parts: list[str] = []
    for line in lines:
        if parts and TITLE.fullmatch(line):
            yield "".join(parts).strip("\n")
            parts = []
        parts.append(line if line.endswith("\n") or not line else f"{line}\n")
    if parts:
        yield "".join(parts).strip("\n")


def _rows(cfg: HubData, files: str) -> Iterator[str]:
    for row in _read(cfg, files):
        text = row.get(cfg.field)
        if not isinstance(text, str):
            expected = f"a column of text ({', '.join(row)})"
            raise ValueError(explain(cfg.path, "data.field", expected, repr(cfg.field)))
        yield text


def _read(cfg: HubData, files: str) -> Iterator[dict[str, object]]:
    # Some seconds to import.
    import datasets
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        path = _place(cfg, files)
        yield from datasets.load_dataset(
            path,
            data_files={"train": files},
            split="train",
            revision=cfg.revision if path == cfg.path else None,
            streaming=cfg.streaming,
            verification_mode="no_checks",  # the commit says what it is
        )
    except Exception as error:  # of a dozen libraries, which share no class of errors
        raise _refusal(cfg, files, error) from error


def _place(cfg: HubData, files: str) -> str:
    """A local folder, the hub's cache where the network is switched off, or the hub's name."""
    from huggingface_hub import constants, snapshot_download

    folder = input_path(cfg.path)
    if folder.is_dir():
        return str(folder)
    if not constants.is_offline_mode():
        return cfg.path
    found = snapshot_download(
        cfg.path,
        repo_type="dataset",
        revision=cfg.revision,
        allow_patterns=files,
        local_files_only=True,
    )
    if not any(Path(found).glob(files)):
        raise FileNotFoundError(f"no {files} in {found}")
    return str(found)


def _refusal(cfg: HubData, files: str, error: Exception) -> ValueError:
    text = str(error).strip() or type(error).__name__
    got = f"{cfg.path!r}: {text.splitlines()[0].rstrip('.')}"
    if input_path(cfg.path).is_dir():
        return ValueError(explain("data.path", f"{files} in the folder", "readable", got))
    at = f" --revision {cfg.revision}" if cfg.revision else ""
    remedy = (
        f"Where there is a network run `hf download {cfg.path} --repo-type dataset{at} "
        f"--include '{files}'` (kept under HF_HOME) or add --local-dir DIR and set data.path=DIR."
    )
    return ValueError(explain("data.path", "dataset", "readable", got, remedy))
