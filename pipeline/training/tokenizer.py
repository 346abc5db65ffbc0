"""A byte-level BPE tokenizer trained on the training split."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, context: int
) -> PreTrainedTokenizerFast:
    """Learn merges from text.

    Args:
        documents: the training split.
        vocab_size: entries, the 256 bytes and the end-of-text token included; fewer come out of too
            little text.
        context: told to the tokenizer as the model's maximal length in tokens.

    Returns:
        A tokenizer that encodes every string without loss; `<|endoftext|>` starts, ends and pads,
        padding is on the left.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
