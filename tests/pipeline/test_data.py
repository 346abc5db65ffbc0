"""Text sources, splits by content, token windows, and the one-line refusals."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest
import torch

from kvsmith.pipeline.data import (
    PydocsData,
    TextfileData,
    load_documents,
    token_blocks,
    token_stream,
    tokens_hash,
)
from kvsmith.pipeline.data import pydocs as pydocs_module
from kvsmith.pipeline.data.split import SHARES, cut, split_of
from kvsmith.pipeline.training.tokenizer import train_tokenizer

SPLITS = ("train", "calibration", "heldout")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["some words about nothing at all"] * 9, 280, 64)


@pytest.fixture
def novel(tmp_path: Path) -> Path:
    path = tmp_path / "novel.txt"
    lines = (f"Chapter {i}: he walked {i * i} steps, then {i * 7} more." * 3 for i in range(2000))
    path.write_text("\n\n".join(lines))
    return path


def test_a_split_is_a_function_of_the_text() -> None:
    # Fixed by the SHA-256 of the text: these answers may never change.
    found = [split_of(f"text {i}") for i in (0, 10, 26)]
    assert found == ["train", "heldout", "calibration"]
    assert sum(SHARES.values()) == 100


def test_shares_of_the_splits_are_kept() -> None:
    counts = dict.fromkeys(SPLITS, 0)
    for i in range(5000):
        counts[split_of(str(i))] += 1
    for split, share in SHARES.items():
        # binomial, four standard deviations
        expected, spread = 50 * share, 4 * (50 * share * (1 - share / 100)) ** 0.5
        assert abs(counts[split] - expected) < spread, split


@hypothesis.given(st.text(alphabet="ab \n", max_size=400), st.integers(1, 40))
def test_cutting_loses_only_blank_space(text: str, size: int) -> None:
    pieces = list(cut(text, size))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(piece.strip() and len(piece) <= 8 * size + 2 for piece in pieces)


def test_an_edit_leaves_later_cuts_where_they_were() -> None:
    paragraphs = [f"Paragraph {i} has its own words, {i * i} of them." for i in range(400)]
    before = list(cut("\n\n".join(paragraphs), 200))
    after = list(cut("\n\n".join(["Something new at the start.", *paragraphs[1:]]), 200))
    assert len(before) > 40
    assert before[-30:] == after[-30:]


def test_pydocs_splits_are_disjoint_english_and_large_enough() -> None:
    splits = {split: list(load_documents(PydocsData(), split)) for split in SPLITS}
    sizes = {split: sum(map(len, texts)) for split, texts in splits.items()}
    assert sizes["train"] > 1_500_000
    assert min(sizes.values()) > 100_000
    keys = {split: {" ".join(t.split()) for t in texts} for split, texts in splits.items()}
    assert not keys["train"] & keys["heldout"] and not keys["train"] & keys["calibration"]
    assert sum(map(len, keys.values())) == sum(map(len, splits.values()))
    assert all(split_of(text) == split for split, texts in splits.items() for text in texts)
    assert any("return" in text for text in splits["heldout"])
    assert any("Lambda expressions" in text for texts in splits.values() for text in texts)


def test_packages_join_the_train_split_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # One small source in place of the standard library: this test is about what is added to it.
    monkeypatch.setattr(pydocs_module.sysconfig, "get_paths", lambda: {"stdlib": "nowhere"})
    pydocs_module._pieces.cache_clear()
    try:
        plain, more = PydocsData(), PydocsData(packages=("rich",))
        added = set(load_documents(more, "train")) - set(load_documents(plain, "train"))
        assert len(added) > 100 and any("Console" in text for text in added)
        for split in ("calibration", "heldout"):
            assert list(load_documents(more, split)) == list(load_documents(plain, split))
        with pytest.raises(ValueError, match=r"data\.packages: .* got 'no_such_package'"):
            list(load_documents(PydocsData(packages=("no_such_package",)), "train"))
    finally:
        pydocs_module._pieces.cache_clear()


def test_comments_are_whole_blocks() -> None:
    source = "#!/bin/sh\n# one\n#   two\nx = 1  # no\n# alone\ny = 2\n    # a\n    #\n    # b\n"
    assert list(pydocs_module._comments(source)) == [(3, "one\n  two"), (9, "a\n\nb")]


def test_a_novel_fills_every_split(novel: Path) -> None:
    cfg = TextfileData(path=str(novel))
    texts = {split: list(load_documents(cfg, split)) for split in SPLITS}
    assert all(texts.values())
    joined = sorted(piece for pieces in texts.values() for piece in pieces)
    assert "".join(sorted(" ".join(joined).split())) == "".join(sorted(novel.read_text().split()))


def test_kinds_of_files_give_the_same_text(tmp_path: Path) -> None:
    texts = [f"Record {i} is short." for i in range(60)]
    rows = [json.dumps({"id": i, "body": text}) for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows[:9], "", *rows[9:]]))
    table = pyarrow.table({"id": list(range(61)), "body": [*texts, None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for i, text in enumerate(texts):
        path = tmp_path / "folder" / f"{i:02d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    for split in SPLITS:
        expected = [text for text in texts if split_of(text) == split]
        for name in ("a.jsonl", "a.parquet", "folder"):
            cfg = TextfileData(path=str(tmp_path / name), field="body")
            assert list(load_documents(cfg, split)) == expected, name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl line 2: line must be a JSON object"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', r"a\.jsonl line 2: line must be a JSON obj.*got list"),
        ("a.jsonl", '{"txt": "x"}\n', r"line 1: data\.field must be a field.*\(txt\), got 'text'"),
        ("a.jsonl", '{"text": 3}\n', r"line 1: field 'text' must be a string, got int"),
        ("a.parquet", "no", r"a\.parquet: file must be a whole Parquet file"),
        ("a.csv", "x", r"data\.path: file must be one of \.txt, \.jsonl, \.parquet, got 'a\.csv'"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list(load_documents(TextfileData(path=str(tmp_path / name)), "train"))


def test_other_refusals(tmp_path: Path) -> None:
    def read(**options: Any) -> None:
        list(load_documents(TextfileData(**options), "train"))

    with pytest.raises(FileNotFoundError, match="existing file or folder, got 'nowhere'"):
        read(path="nowhere")
    with pytest.raises(FileNotFoundError, match="folder must be one with .txt"):
        read(path=str(tmp_path))
    with pytest.raises(ValueError, match=r"data\.path: value must be a file or folder"):
        TextfileData()
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match="UTF-8 text, got byte 3 that is not"):
        read(path=str(tmp_path / "a.txt"))
    pyarrow.parquet.write_table(pyarrow.table({"x": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a column of the table \(x\), got 'text'"):
        read(path=str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match="split: value must be one of train, calibration, heldout"):
        list(load_documents(PydocsData(), "test"))  # type: ignore[arg-type]


def test_windows_are_the_stream_cut_up(tokenizer: Any, novel: Path) -> None:
    cfg = TextfileData(path=str(novel))
    stream = token_stream(tokenizer, load_documents(cfg, "heldout"))
    ids = [tokenizer(text)["input_ids"] for text in load_documents(cfg, "heldout")]
    end = tokenizer.eos_token_id
    assert stream.tolist() == [token for text in ids for token in [*text, end]]
    everything = token_blocks(tokenizer, cfg, "heldout", None, 50)
    assert everything.flatten().tolist() == stream[: len(stream) // 50 * 50].tolist()
    assert torch.equal(token_blocks(tokenizer, cfg, "heldout", 7, 50), everything[:7])


def test_seeded_windows_differ_by_seed_and_do_not_overlap(tokenizer: Any, novel: Path) -> None:
    cfg = TextfileData(path=str(novel))
    grid = {tuple(row) for row in token_blocks(tokenizer, cfg, "train", None, 50).tolist()}
    drawn = [token_blocks(tokenizer, cfg, "train", 20, 50, seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].dtype == torch.int64 and drawn[0].shape == (20, 50)
    rows = {tuple(row) for row in drawn[0].tolist()}
    assert len(rows) == 20 and rows <= grid


def test_too_short_text_says_how_short(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three")
    cfg = TextfileData(path=str(tmp_path / "a.txt"))
    split = split_of("one two three")
    have = len(tokenizer("one two three")["input_ids"]) + 1
    message = rf"at least 60 tokens \(3 x 20\), got {have} in the {split} split of data=textfile"
    with pytest.raises(ValueError, match=message):
        token_blocks(tokenizer, cfg, split, 3, 20)
    (tmp_path / "a.txt").write_text(" \n ")
    with pytest.raises(ValueError, match=r"at least 20 tokens \(1 x 20\), got 0"):
        token_blocks(tokenizer, cfg, "train", None, 20)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        token_blocks(tokenizer, cfg, "train", 1, 0)


def test_the_hash_is_of_the_int64_bytes() -> None:
    tokens = torch.tensor([[1, 2], [3, 258]])
    expected = hashlib.sha256(b"".join(int(t).to_bytes(8, "little") for t in [1, 2, 3, 258]))
    assert tokens_hash(tokens) == expected.hexdigest()
    assert tokens_hash(tokens.T.contiguous()) != expected.hexdigest()
    assert tokens_hash(tokens.to(torch.int32).t().t()) == expected.hexdigest()
