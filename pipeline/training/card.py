"""The model card: written from the run's record, so that every number in it was measured."""

from __future__ import annotations

from typing import Any

LICENCES = {
    "pydocs": "The text is Python's own documentation (language reference, docstrings, comments "
    "and built-in help), distributed under the PSF licence{packages}. The weights are released "
    "under Apache-2.0, as the code that made them.",
    "textfile": "The text is the trainer's own; its licence decides what the weights are for.",
}

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [kvsmith]
---
# {name}

A small Llama-family language model for trying out KV cache compression without a download. It was
trained from scratch by `python train.py` on the train split of {text} (run {identity}).
It writes text that looks like its corpus; it knows nothing else and should not be asked for facts.

| | |
|---|---|
{table}

Held-out perplexity: {windows} windows of {length} tokens that do not overlap, of the heldout split
of `data={kind}` (a split by content hash), each read from its first token, in float32 with the
stored bfloat16 weights.

Greedy continuation of "{prompt}":

```text
{continuation}
```

The whole configuration and the hash of the training tokens are in `training.json`, the course of
training in `training_log.jsonl`. There `heldout_loss` is of {eval_windows} windows of the whole
context, so it drops when the training sequences reach that length.

{licence}
"""


def model_card(name: str, record: dict[str, Any]) -> str:
    """Compose README.md of a model folder.

    Args:
        name: the folder's name.
        record: what `training.json` holds.

    Returns:
        Markdown.
    """
    kind = record["data"]["kind"]
    packages = ", ".join(record["data"].get("packages", ()))
    more = f"; the docstrings and comments of {packages} are under the licences of these packages"
    return CARD.format(
        name=name,
        text=f"`data={kind}`" + (f", with docstrings and comments of {packages}" * bool(packages)),
        identity=record["identity"],
        table="\n".join(f"| {left} | {right} |" for left, right in _rows(record).items()),
        windows=record["heldout"]["windows"],
        length=record["heldout"]["length"],
        kind=kind,
        eval_windows=record["pretrain"]["optim"]["eval_windows"],
        prompt=record["sample"]["prompt"],
        continuation=record["sample"]["continuation"].strip(),
        licence=LICENCES[kind].format(packages=more if packages else ""),
    )


def _rows(record: dict[str, Any]) -> dict[str, str]:
    """The table of the card."""
    arch, optim, heldout = (
        record["pretrain"]["arch"],
        record["pretrain"]["optim"],
        record["heldout"],
    )
    phases = [f"{p['share']:.0%} in sequences of {p['length']}" for p in optim["phases"]]
    passes = record["tokens_seen"] / record["training_tokens"]
    minutes, cpu = record["training_seconds"] / 60, record["training_cpu_seconds"] / 60
    betas = ", ".join(f"{beta:g}" for beta in optim["betas"])
    return {
        "parameters": f"{record['parameters']:,} (embeddings tied)",
        "layers, hidden, MLP": f"{arch['layers']}, {arch['hidden_size']}, {arch['mlp_size']}",
        "heads": f"{arch['heads']} query, {arch['kv_heads']} key-value, of {arch['head_dim']}",
        "positions": f"RoPE, theta {arch['rope_theta']:g}, context {arch['context']}",
        "vocabulary": f"{arch['vocab_size']}, byte-level BPE",
        "tokens seen": f"{record['tokens_seen']:,}, {passes:.1f} times the text",
        "batch": f"{optim['batch_tokens']:,} tokens; {', then '.join(phases)}",
        "optimizer": f"AdamW ({betas}), weight decay {optim['weight_decay']:g}, "
        f"clip {optim['grad_clip']:g}",
        "learning rate": f"{optim['lr']:g} after {optim['warmup_steps']} steps, "
        f"cosine to {optim['final_lr']:g} of it",
        "dropout": f"{optim['dropout']:g} on what enters the residual stream",
        "precision": f"{optim['precision']} autocast, float32 weights, stored as bfloat16",
        "training time": f"{minutes:.0f} min; {cpu:.0f} min of processor time",
        "held-out perplexity": f"**{heldout['perplexity']:.3f}** "
        f"({heldout['loss']:.4f} nats a token)",
    }
