"""Datasets of the hub, on small folders that are laid out like them."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from kvsmith.pipeline.config import load
from kvsmith.pipeline.data import HubData, data_name, load_documents, token_blocks
from kvsmith.pipeline.data import hub as hub_module
from kvsmith.pipeline.data.split import split_of
from kvsmith.pipeline.evaluate import EvaluateConfig
from kvsmith.pipeline.training.tokenizer import train_tokenizer

SPLITS = ("train", "calibration", "heldout")


def configured(name: str, folder: Path | None = None) -> HubData:
    """What conf/data/<name>.yaml says, read from `folder`."""
    cfg = load(EvaluateConfig, "evaluate", [f"data={name}"]).data
    assert isinstance(cfg, HubData)
    return cfg if folder is None else replace(cfg, path=str(folder))


def read(cfg: HubData, split: Any) -> list[str]:
    return list(load_documents(cfg, split))


def write_parquet(path: Path, rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path)


def article(name: str) -> list[str]:
    lines = ["", f" = {name} = \n", "", f" {name} is a thing . It = 2 . \n", "", " = = Use = = \n"]
    return [*lines, " = = = More = = = \n", f" {name} is used . \n"]


@pytest.fixture
def wikitext(tmp_path: Path) -> Path:
    folder = tmp_path / "wikitext"
    for split, names in (("train", range(60)), ("test", range(60, 64)), ("validation", (99,))):
        rows = [line for i in names for line in article(f"Thing {i}")]
        write_parquet(folder / f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet", rows)
    write_parquet(folder / "wikitext-103-raw-v1/test-00000-of-00001.parquet", ["other"])
    return folder


@pytest.fixture
def c4(tmp_path: Path) -> Path:
    folder = tmp_path / "c4"
    (folder / "en").mkdir(parents=True)
    for split, shards in (("train", 3), ("validation", 2)):
        for shard in range(shards):
            name = f"en/c4-{split}.{shard:05d}-of-{shards:05d}.json.gz"
            pages = [f"{split} page {shard}-{i}" for i in range(30)]
            rows = [{"text": text, "timestamp": "2019", "url": "x"} for text in pages]
            with gzip.open(folder / name, "wt", encoding="utf-8") as file:
                file.write("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_wikitext_is_read_by_articles_and_split_by_their_content(wikitext: Path) -> None:
    cfg = configured("wikitext2", wikitext)
    heldout = read(cfg, "heldout")
    assert [text.splitlines()[0] for text in heldout] == [f" = Thing {i} = " for i in range(60, 64)]
    assert "It = 2 ." in heldout[0] and " = = = More = = = " in heldout[0]
    assert heldout[0].endswith("Thing 60 is used . ")
    parts = {split: read(cfg, split) for split in ("train", "calibration")}
    assert all(parts.values()) and sum(map(len, parts.values())) == 60
    for text in parts["calibration"]:
        assert split_of(text) == "calibration"
    assert not set(parts["train"]) & set(parts["calibration"])


@pytest.mark.parametrize("streaming", [True, False])
def test_c4_takes_training_and_validation_in_the_order_of_the_shards(
    c4: Path, streaming: bool
) -> None:
    cfg = replace(configured("c4", c4), streaming=streaming)
    assert configured("c4").streaming
    pages = [f"validation page {shard}-{i}" for shard in range(2) for i in range(30)]
    assert read(cfg, "heldout") == pages
    train, calibration = read(cfg, "train"), read(cfg, "calibration")
    assert len(train) + len(calibration) == 90 and calibration
    assert all(text.startswith("train page") for text in (*train, *calibration))


def test_a_stream_is_read_only_as_far_as_needed(tmp_path: Path) -> None:
    books = [f"Book {i}. " + f"He walked {i} steps. " * 4000 for i in range(40)]
    for i, book in enumerate(books):
        write_parquet(tmp_path / f"pg19/data/test-{i:05d}-of-00040.parquet", [book])
    (tmp_path / "pg19/data/test-00039-of-00040.parquet").write_bytes(b"never read")
    cfg = configured("pg19", tmp_path / "pg19")
    tokenizer = train_tokenizer(["he walked some steps"] * 9, 280, 64)
    windows = token_blocks(tokenizer, cfg, "heldout", 4, 100)
    # The text of a book is not interrupted, and nothing but the book is in it.
    assert tokenizer.decode(windows.flatten().tolist()) in books[0]
    both = token_blocks(tokenizer, cfg, "heldout", 3, 60000).flatten().tolist()
    assert both.count(tokenizer.eos_token_id) >= 1
    assert tokenizer.decode(both).split(tokenizer.eos_token)[1].startswith("Book 1.")


@pytest.mark.parametrize("name", ["wikitext2", "c4", "pg19"])
def test_offline_one_line_says_how_to_get_it(name: str) -> None:
    cfg = configured(name)
    with pytest.raises(ValueError, match=f"hf download {cfg.path} --repo-type dataset") as error:
        read(cfg, "heldout")
    assert "\n" not in str(error.value) and f"--include '{cfg.heldout}'" in str(error.value)
    assert cfg.revision is not None and len(cfg.revision) == 40 and cfg.revision in str(error.value)


def test_the_hub_is_asked_for_the_pinned_files(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, **options: Any) -> list[dict[str, str]]:
        asked.append((path, options))
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    cfg = configured("c4")
    assert read(cfg, "heldout") == ["one", "two"]
    ((path, options),) = asked
    assert (path, options["revision"], options["streaming"]) == ("allenai/c4", cfg.revision, True)
    assert options["data_files"] == {"train": "en/c4-validation.*.json.gz"}
    assert data_name(cfg) == "c4" and data_name(configured("wikitext2")) == "wikitext"


def test_what_was_downloaded_is_found_in_the_cache_of_the_hub(
    c4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / f"hub/datasets--allenai--c4/snapshots/{configured('c4').revision}"
    place.parent.mkdir(parents=True)
    c4.rename(place)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    texts = read(configured("c4"), "heldout")
    assert texts[0] == "validation page 0-0" and len(texts) == 60
    (place / "en/c4-validation.00000-of-00002.json.gz").unlink()
    (place / "en/c4-validation.00001-of-00002.json.gz").unlink()
    with pytest.raises(ValueError, match=r"no en/c4-validation.* in .*snapshots.*hf download"):
        read(configured("c4"), "heldout")


def test_other_refusals(c4: Path) -> None:
    cfg = configured("c4", c4)
    with pytest.raises(ValueError, match=r"data\.field must be a column of text \(text, timest"):
        read(replace(cfg, field="txt"), "heldout")
    with pytest.raises(ValueError, match=r"none\*.json in the folder must be readable"):
        read(replace(cfg, train="none*.json"), "train")
    (c4 / "en/c4-validation.00001-of-00002.json.gz").write_bytes(b"\x1f\x8bno")
    with pytest.raises(ValueError, match=r"in the folder must be readable") as error:
        read(cfg, "heldout")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"data\.train: value must be given"):
        HubData(path="a/b")


def test_titles() -> None:
    assert hub_module.TITLE.fullmatch(" = Robert <unk> = \n")
    for line in (" = = Use = = \n", " = = = More = = = \n", " x = y \n", "", " = 2 \n"):
        assert not hub_module.TITLE.fullmatch(line)
