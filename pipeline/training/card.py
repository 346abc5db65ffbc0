"""The model card: written from the run's record, so that every number in it was measured."""

from __future__ import annotations

from typing import Any

LICENCES = {
    "pydocs": "The text is Python's own documentation (language reference, docstrings, comments "
    "and built-in help), distributed under the PSF licence. The weights are released under "
    "Apache-2.0, as the code that made them.",
    "textfile": "The text is the trainer's own; its licence decides what the weights are for.",
}


def model_card(name: str, record: dict[str, Any]) -> str:
    """Compose README.md of a model folder.

    Args:
        name: the folder's name.
        record: what `training.json` holds.

    Returns:
        Markdown.
    """
    arch, optim, heldout = (
        record["pretrain"]["arch"],
        record["pretrain"]["optim"],
        record["heldout"],
    )
    phases = ", then ".join(
        f"{phase['share']:.0%} in sequences of {phase['length']}" for phase in optim["phases"]
    )
    kind = record["data"]["kind"]
    passes = record["tokens_seen"] / record["training_tokens"]
    minutes, cpu = record["training_seconds"] / 60, record["training_cpu_seconds"] / 60
    betas, decay = tuple(optim["betas"]), optim["weight_decay"]
    warm_up = f"{optim['lr']:g} after {optim['warmup_steps']} steps"
    rows = [
        ("parameters", f"{record['parameters']:,} (embeddings tied)"),
        ("layers, hidden, MLP", f"{arch['layers']}, {arch['hidden_size']}, {arch['mlp_size']}"),
        ("heads", f"{arch['heads']} query, {arch['kv_heads']} key-value, of {arch['head_dim']}"),
        ("positions", f"RoPE, theta {arch['rope_theta']:g}, context {arch['context']}"),
        ("vocabulary", f"{arch['vocab_size']}, byte-level BPE"),
        (
            "tokens seen",
            f"{record['tokens_seen']:,}, {passes:.1f} times the text",
        ),
        ("batch", f"{optim['batch_tokens']:,} tokens; {phases}"),
        (
            "optimizer",
            f"AdamW {betas}, weight decay {decay:g}, clip {optim['grad_clip']:g}",
        ),
        (
            "learning rate",
            f"{warm_up}, cosine to {optim['final_lr']:g} of it",
        ),
        ("dropout", f"{optim['dropout']:g} on what enters the residual stream"),
        ("time", f"{minutes:.0f} min, {cpu:.0f} min of processor time"),
        ("precision", f"{optim['precision']} autocast, float32 master weights, stored as bfloat16"),
        (
            "held-out perplexity",
            f"**{heldout['perplexity']:.3f}** ({heldout['loss']:.4f} nats a token)",
        ),
    ]
    table = "\n".join(f"| {left} | {right} |" for left, right in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [kvsmith]
---
# {name}

A small Llama-family language model for trying out KV cache compression without a download. It was
trained from scratch by `python train.py` on the train split of `data={kind}` (run
{record["identity"]}). It writes text that looks like its corpus; it knows nothing else and should
not be asked for facts.

| | |
|---|---|
{table}

Held-out perplexity: {heldout["windows"]} windows of {heldout["length"]} tokens that do not overlap,
of the heldout split (a split by content hash), each read from its first token, float32, with the
stored bfloat16 weights.

Greedy continuation of "{record["sample"]["prompt"]}":

```text
{record["sample"]["continuation"].strip()}
```

The whole configuration and the hashes of the tokens are in `training.json`, the course of training
in `training_log.jsonl`.

{LICENCES[kind]}
"""
