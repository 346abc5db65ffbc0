"""README.md of a bundle: the card that the hub shows. The same manifest gives the same text."""

from __future__ import annotations

import json
import re

import torch

from kvsmith.bundle.manifest import Manifest
from kvsmith.sizes import bits_per_element
from kvsmith.spec import CodecSpec, Identity, StaticThreshold, TensorCodec

LENGTHS = {"1K": 2**10, "32K": 2**15, "1M": 2**20}
# What evaluate.py measured and the card shows; the manifest holds all of it.
SHORT = {
    "footprint.length": "tokens of a row, for the two sizes",
    "footprint.nbytes": "bytes of its cache, everything counted",
    "footprint.bits_per_element": "bits per element",
    "fidelity.tokens": "held-out tokens scored",
    "fidelity.perplexity": "perplexity",
    "fidelity.delta": "its change against full precision (0.01 is one percent)",
    "fidelity.delta_se": "standard error of that",
    "fidelity.kld": "KL divergence from full precision, nats a token",
    "fidelity.kld_se": "standard error of that",
    "fidelity.top1": "share of tokens with the same most likely one",
    "agreement.length": "greedy tokens until the first difference",
    "agreement.new_tokens": "of so many",
    "drift.kld": "KL divergence along full precision's own continuation",
    "recall.gain": "recall of a planted string, nats a token",
    "together.gain": "recall of several in one text",
    "answers.exact": "share of questions answered exactly",
    "answers.questions": "questions",
}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def model_card(manifest: Manifest) -> str:
    """Write the card.

    Args:
        manifest: its `files` are not used.

    Returns:
        Markdown with YAML front matter, a newline at its end.
    """
    base, codec = manifest.base_model, manifest.cache.codec
    layers = f"{len(base.layers)} layers, {base.geometry.elements} key and value elements a token"
    delta = manifest.delta
    parts = [
        *_front_matter(base.id if delta is None else delta.id),
        f"# Compressed KV cache for {_code(base.id)}",
        "",
        *_use(manifest),
        "",
        "| part | stored as |",
        "|---|---|",
        f"| keys | {describe(codec.k)}, {codec.key_domain}-RoPE |",
        f"| values | {describe(codec.v)} |",
        *_own_layers(manifest),
        f"| dense | the first {codec.sinks} tokens and the newest {_newest(codec, codec.recent)} |",
        f"| model | {layers} |",
        "",
        *_sizes(manifest),
        *_calibration(manifest),
        *_quality(manifest),
        f"Written by {manifest.created_by}; format version {manifest.format_version}.",
    ]
    return "\n".join(parts) + "\n"


def sizes(manifest: Manifest) -> dict[str, float]:
    """All-in bits an element at the lengths that are shown, batch 1, dense tokens in bfloat16."""
    geometry = manifest.base_model.geometry
    return {
        label: bits_per_element(manifest.cache, geometry, 1, tokens, torch.bfloat16)
        for label, tokens in LENGTHS.items()
    }


def describe(codec: TensorCodec) -> str:
    """A codec in a few words."""
    q = codec.quantizer
    if isinstance(q, Identity):
        return "not quantized"
    group = "" if q.group_size is None else f" in groups of {q.group_size}"
    words = [f"{q.kind} {q.bits} bits", f"{q.range} range per {q.axis}{group}"]
    if q.kind == "nuq":
        words[0] += f" ({q.table} table{', Q-Norm' if q.q_norm else ''})"
    if codec.rotation:
        words.append(f"{codec.rotation} rotation of each head")
    if codec.outliers:
        rule = "static threshold" if isinstance(codec.outliers, StaticThreshold) else "top k"
        words.append(f"{100 * codec.fraction:g} % outliers by {rule}")
    if low := codec.low_rank:
        prompt = f" ({low.prompt_rank} in the prompt)" if low.prompt_rank else ""
        width = f"{low.bits} bits" if low.bits else "the dtype of ranges"
        words.append(f"low rank {low.rank}{prompt}, factors in {width}")
    return ", ".join(words)


def _front_matter(model: str) -> list[str]:
    base = [f"base_model: {json.dumps(model)}"] if _HUB_NAME.fullmatch(model) else []
    return [
        "---",
        "library_name: kvsmith",
        *base,
        "tags:",
        "- kv-cache",
        "- quantization",
        "---",
        "",
    ]


def _use(manifest: Manifest) -> list[str]:
    """What the bundle is, and the lines of Python that use it."""
    what = "what a KV cache needs to store its tokens in few bits"
    lines = ['cache = kvsmith.Bundle.from_pretrained("this folder or hub name").cache(model)']
    if (delta := manifest.delta) is None:
        what += "; no weights"
    else:
        base, id = manifest.base_model.geometry, _code(delta.id)
        what += f", and what changes {id} into its model ({len(base.owners)} of "
        what += f"{len(base.layers)} layers own tokens)"
        lines = [
            'bundle = kvsmith.Bundle.from_pretrained("this folder or hub name")',
            f"bundle.apply(model)  # once, to {id.strip('`')} as it was published",
            "cache = bundle.cache(model)",
        ]
    use = "model.generate(**inputs, past_key_values=cache)"
    return [f"A kvsmith bundle: {what}.", "", "```python", "import kvsmith", *lines, use, "```"]


def _newest(codec: CodecSpec, recent: int) -> str:
    last = recent + codec.block_size - 1
    return f"{recent} to {last}" if last > recent else str(recent)


def _own_layers(manifest: Manifest) -> list[str]:
    """A row for each layer with codecs of its own."""
    codec, rows = manifest.cache.codec, []
    for own in codec.layers:
        newest = "" if own.recent is None else f"; the newest {_newest(codec, own.recent)} dense"
        rows.append(
            f"| layer {own.layer} | keys {describe(own.k)}; values {describe(own.v)}{newest} |"
        )
    return rows


def _sizes(manifest: Manifest) -> list[str]:
    bits = sizes(manifest)
    return [
        "Bits per element, everything counted (batch 1, dense tokens in bfloat16):",
        "",
        f"| tokens | {' | '.join(bits)} |",
        f"|---|{'---|' * len(bits)}",
        f"| bits | {' | '.join(f'{b:.3f}' for b in bits.values())} |",
        "",
    ]


def _calibration(manifest: Manifest) -> list[str]:
    c = manifest.calibration
    if c is None:
        return ["No calibration: the codec computes what it needs from the tokens.", ""]
    text = f"{_code(c.dataset)}{'' if c.revision is None else f' at {_code(c.revision)}'}"
    return [
        f"Calibrated on {c.samples} sequences of {c.length} tokens from {text}",
        f"(seed {c.seed}, tokens {c.tokens_hash[:8]}), sensitivity {_code(c.sensitivity)}.",
        "",
    ]


def _quality(manifest: Manifest) -> list[str]:
    if not manifest.quality:
        return []
    short = {n: words for n, words in SHORT.items() if n in manifest.quality}
    if short:
        rows = [f"| {words} | {manifest.quality[n]:.4g} |" for n, words in short.items()]
    else:
        quality = sorted(manifest.quality.items())
        rows = [f"| {_code(name)} | {value:.6g} |" for name, value in quality]
    return ["| measured | value |", "|---|---|", *rows, ""]


def _code(text: str) -> str:
    """Text of others as Markdown code, which ends neither the line, the cell nor the code."""
    return "`" + re.sub(r"[`|\s]+|[^ -~]", " ", text) + "`"
