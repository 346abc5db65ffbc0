"""Random models of many architectures, small enough to run in milliseconds."""

import torch
import transformers
from transformers import AutoModelForCausalLM

_SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama-mqa": ("LlamaConfig", {"num_key_value_heads": 1}),
    "llama-mha": ("LlamaConfig", {"num_key_value_heads": 4}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
}


def build(family, layers=2, seed=0):
    """A model in float32 and eval mode; the same weights for the same seed."""
    name, options = FAMILIES[family]
    config = getattr(transformers, name)(**{**_SHAPE, "num_hidden_layers": layers, **options})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def run(model, ids, cache, steps, mask):
    """Logits [B, T, V] of a prompt fed in the given steps."""
    outs, done = [], 0
    for step in steps:
        seen = None if mask is None else mask[:, : done + step]
        part = ids[:, done : done + step]
        out = model(part, attention_mask=seen, past_key_values=cache, use_cache=True)
        outs.append(out.logits)
        done += step
    return torch.cat(outs, dim=1)
