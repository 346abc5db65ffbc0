"""The model that is trained: Llama family, grouped-query attention, RoPE, tied embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvsmith.errors import explain


@dataclass(frozen=True)
class Architecture:
    """Sizes of a Llama-family model.

    Args:
        vocab_size: entries of the byte-level BPE vocabulary, the end-of-text token included.
        hidden_size, layers, heads, kv_heads, head_dim, mlp_size: as usual; `heads` is a multiple of
            `kv_heads`.
        context: longest sequence in tokens that the model is trained for.
        rope_theta: base of the rotary frequencies.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_size: int
    context: int
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(explain(f"pretrain.arch.{name}", "value", "positive", value))
        if self.vocab_size < 257:
            raise ValueError(
                explain(
                    "pretrain.arch.vocab_size",
                    "value",
                    "at least 257 (bytes and end of text)",
                    self.vocab_size,
                )
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                explain(
                    "pretrain.arch.heads",
                    "value",
                    f"a multiple of kv_heads ({self.kv_heads})",
                    self.heads,
                )
            )


def build_model(arch: Architecture, end_of_text: int, seed: int) -> LlamaForCausalLM:
    """Make a freshly initialised model.

    Args:
        arch: sizes.
        end_of_text: token id that starts, ends and pads.
        seed: of the initial weights.

    Returns:
        A float32 model on the CPU, in training mode. Matrices that write into the residual stream
        start smaller by sqrt(2 x layers), so that its variance does not grow with depth.
    """
    config = LlamaConfig(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.mlp_size,
        num_hidden_layers=arch.layers,
        num_attention_heads=arch.heads,
        num_key_value_heads=arch.kv_heads,
        head_dim=arch.head_dim,
        max_position_embeddings=arch.context,
        rope_parameters={"rope_type": "default", "rope_theta": arch.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight /= (2 * arch.layers) ** 0.5
    return model.train()
