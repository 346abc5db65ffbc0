"""From documents to token windows: joined by end-of-text, cut equally, chosen by a seed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvsmith.errors import explain
from kvsmith.pipeline.data.documents import DataConfig, data_name, load_documents
from kvsmith.pipeline.data.split import Split

# Random windows come from the first POOL x n of the split: a huge corpus is not read to its end.
POOL = 16
BATCH = 256  # documents tokenized at once
BATCH_CHARS = 2**20  # fewer of them where they are long


def token_blocks(
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    split: Split,
    n: int | None,
    length: int,
    seed: int | None = None,
) -> Tensor:
    """Windows of tokens from one split; the same arguments give the same tokens.

    Documents are joined in order with the end-of-text token after each (the tokenizer's other
    special tokens are not added) and the stream is cut into windows that do not overlap.

    Args:
        tokenizer: of the model that reads the windows.
        cfg: the source of text.
        split: train, calibration or heldout.
        n: number of windows; None takes every whole window.
        length: tokens in a window.
        seed: None takes the first `n` windows in order; an integer draws `n` windows without
            replacement.

    Returns:
        [n, length] int64.

    Raises:
        FileNotFoundError, ValueError: the source is missing, broken, empty or too short; says how
            many tokens there are.
    """
    for name, value in (("n", n), ("length", length)):
        if value is not None and value < 1:
            raise ValueError(explain("token_blocks", name, "at least 1", value))
    limit = None if n is None else n * length * (1 if seed is None else POOL)
    tokens = token_stream(tokenizer, load_documents(cfg, split), limit)
    needed = length if n is None else n * length
    if len(tokens) < needed:
        shape = f"{needed} tokens ({n or 1} x {length})"
        got = f"{len(tokens)} in the {split} split of data={data_name(cfg)}"
        raise ValueError(
            explain(
                "data",
                "text",
                f"at least {shape}",
                got,
                "Give more text, or ask for fewer or shorter samples.",
            )
        )
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    if n is None or seed is None:
        return windows[:n].clone()
    # random.Random is specified to give the same sequence on every platform and version
    return windows[torch.tensor(random.Random(seed).sample(range(len(windows)), n))]


def token_stream(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], limit: int | None = None
) -> Tensor:
    """Tokenize documents and join them, the end-of-text token (if there is one) after each.

    Args:
        tokenizer: any.
        documents: texts.
        limit: stop after this many tokens; None reads everything.

    Returns:
        [tokens] int64, at most `limit`.
    """
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    parts: list[Tensor] = []
    total = 0
    for batch in _batches(documents):
        encoded = tokenizer(
            batch, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        parts += [torch.tensor([*ids, *end], dtype=torch.int64) for ids in encoded]
        total += sum(len(ids) + len(end) for ids in encoded)
        if limit is not None and total >= limit:
            break
    return torch.cat(parts)[:limit] if parts else torch.empty(0, dtype=torch.int64)


def tokens_hash(tokens: Tensor) -> str:
    """SHA-256 in hexadecimal of the tokens as little-endian int64; the shape does not count."""
    return hashlib.sha256(
        tokens.to(torch.int64).cpu().contiguous().numpy().astype("<i8").tobytes()
    ).hexdigest()


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if len(batch) == BATCH or size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
