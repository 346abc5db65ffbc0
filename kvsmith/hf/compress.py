"""`with kvsmith.compress(model, bundle): model.generate(...)`: the cache comes by itself."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, TextGenerationPipeline
from transformers.pipelines import PIPELINE_REGISTRY

from kvsmith.errors import explain
from kvsmith.hf.cache import KVCache

TASK = "kvsmith-text-generation"


@dataclass
class Compression:
    """What went on inside `compress`.

    Attributes:
        cache: the cache of the latest call; None before the first.
    """

    cache: KVCache | None = None


@contextlib.contextmanager
def compress(model: PreTrainedModel, new_cache: Callable[[], KVCache]) -> Iterator[Compression]:
    """Give every `generate` call, and every forward pass with `use_cache=True`, a cache of its own.

    Calls that bring `past_key_values` keep it.

    Args:
        model: a transformers model; as it was when the block ends.
        new_cache: makes an empty cache.

    Yields:
        Compression, whose `cache` tells what the latest call stored.

    Raises:
        ValueError: the model is inside such a block already.
    """
    if "generate" in vars(model):
        raise ValueError(explain("compress", "model", "outside of another compress", "inside one"))
    used, plain = Compression(), model.generate

    def fresh() -> KVCache:
        used.cache = new_cache()
        return used.cache

    @functools.wraps(plain)
    def generate(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is None and kwargs.get("use_cache", True):
            kwargs["past_key_values"] = fresh()
        return plain(*args, **kwargs)

    def before(_module: Any, args: Any, kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is None and kwargs.get("use_cache"):
            kwargs = {**kwargs, "past_key_values": fresh()}
        return args, kwargs

    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    vars(model)["generate"] = generate
    try:
        yield used
    finally:
        del vars(model)["generate"]
        hook.remove()


class CompressedTextGeneration(TextGenerationPipeline):
    """transformers' text generation with a compressed cache.

    `transformers.pipeline("kvsmith-text-generation", model=..., bundle="folder or hub name")`; the
    task is known once `kvsmith.hf.compress` is imported.

    Args:
        bundle: a bundle, or its folder or hub name.
    """

    def __init__(self, *args: Any, bundle: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from kvsmith.bundle import Bundle

        self._bundle = bundle if isinstance(bundle, Bundle) else Bundle.from_pretrained(bundle)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        with compress(self.model, lambda: self._bundle.cache(self.model)):
            return super()._forward(*args, **kwargs)


PIPELINE_REGISTRY.register_pipeline(
    TASK,
    pipeline_class=CompressedTextGeneration,
    pt_model=PIPELINE_REGISTRY.supported_tasks["text-generation"]["pt"],
)
