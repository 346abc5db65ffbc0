"""Bytes and speed of one sequence at a stated length.

Bytes are those of the allocated tensors, everything included: codes, ranges, outliers, dense
windows, codebooks, positions, and the unused end of the last page. Speed is wall time of decoding
one token at a time, without sampling.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class Footprint:
    """Size and speed of one candidate.

    Attributes:
        length: tokens in the cache, one row.
        nbytes: allocated bytes.
        bits_per_element: 8 * nbytes over the key and value elements of `length` tokens.
        tokens_per_second: median over the repeats.
        repeats: timed runs.
        timed_tokens: tokens decoded in each.
    """

    length: int
    nbytes: int
    bits_per_element: float
    tokens_per_second: float
    repeats: int
    timed_tokens: int


@torch.inference_mode()
def footprint(
    model: PreTrainedModel,
    cache: Cache,
    ids: Tensor,
    elements: int,
    repeats: int,
    timed_tokens: int,
) -> Footprint:
    """Fill a cache to the length of `ids`, timing the last tokens.

    Args:
        model: a causal language model in evaluation mode.
        cache: an empty cache.
        ids: [1, T] int64, T > repeats * timed_tokens + 1.
        elements: key and value elements of one token over all layers that own tokens.
        repeats: timed runs, each continues where the last one stopped.
        timed_tokens: tokens of each.
    """
    length = ids.shape[1]
    start = length - repeats * timed_tokens
    model(input_ids=ids[:, : start - 1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    _steps(
        model, cache, ids[:, start - 1 : start]
    )  # the first step also pays for what is set up once
    seconds = [
        _steps(model, cache, ids[:, at : at + timed_tokens])
        for at in range(start, length, timed_tokens)
    ]
    size = nbytes(cache)
    return Footprint(
        length=length,
        nbytes=size,
        bits_per_element=8 * size / (length * elements),
        tokens_per_second=timed_tokens / statistics.median(seconds),
        repeats=repeats,
        timed_tokens=timed_tokens,
    )


def nbytes(cache: Cache) -> int:
    """Allocated bytes of our cache (`cache.nbytes()`) or of transformers' uncompressed one."""
    if isinstance(cache, DynamicCache):
        return sum(
            t.numel() * t.element_size()
            for layer in cache.layers
            for t in (layer.keys, layer.values)
        )
    size: int = cache.nbytes()
    return size


def _steps(model: PreTrainedModel, cache: Cache, ids: Tensor) -> float:
    """Decode `ids` [1, T] one token at a time; seconds."""
    _wait(ids)
    began = time.perf_counter()
    for token in ids.split(1, dim=1):
        model(input_ids=token, past_key_values=cache, use_cache=True)
    _wait(ids)
    return time.perf_counter() - began


def _wait(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
