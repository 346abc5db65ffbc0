"""A model folder and a text file small enough that a whole script runs on them in a second."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<|end|>"


def write_model(folder: Path, micro_llama: Callable[..., Any], **shape: Any) -> Path:
    """Save a random Llama with a tokenizer of single bytes; returns `folder`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, END])}
    inner = Tokenizer(models.BPE(vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END).save_pretrained(folder)
    end = vocabulary[END]
    model = micro_llama(vocab=len(vocabulary), eos_token_id=end, pad_token_id=end, **shape)
    model.save_pretrained(folder)
    return folder


def write_text(path: Path, characters: int = 60_000) -> Path:
    """Write paragraphs of random words, enough for every split; returns `path`."""
    rng = random.Random(0)
    words = [w for w in "apple bread copper delta ember flint grove harbor island jungle".split()]
    text = ""
    while len(text) < characters:
        text += " ".join(rng.choices(words, k=30)) + ".\n\n"
    path.write_text(text, "utf-8")
    return path
