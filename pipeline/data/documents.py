"""One function over all sources of text: `load_documents(cfg, split)`.

A source is a frozen dataclass with its own `kind` and a generator of pieces; a new one adds a file
beside this, a member of `DataConfig`, a branch below and a YAML file in `conf/data/`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from kvsmith.errors import explain
from kvsmith.pipeline.data.hub import HubData, hub_documents
from kvsmith.pipeline.data.pydocs import PydocsData, pydocs_documents
from kvsmith.pipeline.data.split import Split
from kvsmith.pipeline.data.textfile import TextfileData, textfile_documents

DataConfig = PydocsData | TextfileData | HubData


def load_documents(cfg: DataConfig, split: Split) -> Iterator[str]:
    """Stream the documents of one split in a fixed order.

    Args:
        cfg: which source.
        split: train, calibration or heldout; disjoint by content.

    Yields:
        Non-empty texts; long documents of one's own files arrive in pieces, those of the hub whole.

    Raises:
        FileNotFoundError, ValueError: the source is missing or broken, or the split is unknown.
    """
    if split not in get_args(Split):
        raise ValueError(
            explain("split", "value", f"one of {', '.join(get_args(Split))}", repr(split))
        )
    yield from (text for text in _documents(cfg, split) if text.strip())


def _documents(cfg: DataConfig, split: Split) -> Iterator[str]:
    if isinstance(cfg, PydocsData):
        return pydocs_documents(cfg, split)
    if isinstance(cfg, TextfileData):
        return textfile_documents(cfg, split)
    return hub_documents(cfg, split)


def data_name(cfg: DataConfig) -> str:
    """A word for tables and messages: the kind of text, or the last part of a dataset's name."""
    return Path(cfg.path).name if isinstance(cfg, HubData) else cfg.kind
