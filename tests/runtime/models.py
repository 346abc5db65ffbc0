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
_GPT = {"num_key_value_heads": None, "n_embd": 64, "n_head": 4, "n_positions": 512}
_FALCON = {"num_key_value_heads": None, "new_decoder_architecture": False}
_SHARED = {
    "head_dim": 16,
    "sliding_window": 16,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


def _rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


# name -> (configuration class, options that differ from _SHAPE)
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama-mqa": ("LlamaConfig", {"num_key_value_heads": 1}),
    "llama-mha": ("LlamaConfig", {"num_key_value_heads": 4}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "llama-linear": ("LlamaConfig", _rope("linear", factor=2.0)),
    "llama-llama3": (
        "LlamaConfig",
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama-yarn": ("LlamaConfig", _rope("yarn", factor=8.0, original_max_position_embeddings=64)),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 16}),
    "gemma3n": (
        "Gemma3nTextConfig",
        {
            **_SHARED,
            "altup_num_inputs": 2,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "gemma4": ("Gemma4TextConfig", {**_SHARED, "global_head_dim": 32}),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", {}),
    "stablelm": ("StableLmConfig", {}),
    "glm": ("GlmConfig", {"head_dim": 16}),
    "gpt_neox": ("GPTNeoXConfig", {"num_key_value_heads": None}),
    "cohere": ("CohereConfig", {}),
    "cohere2": ("Cohere2Config", {"sliding_window": 16, "head_dim": 16}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", {"sliding_window": 16}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 1, 1, 0]}),
    "exaone4": ("Exaone4Config", {"sliding_window": 16, "head_dim": 16}),
    "granite": ("GraniteConfig", {}),
    "starcoder2": ("Starcoder2Config", {}),
    "nemotron": ("NemotronConfig", {}),
    "gpt_oss": (
        "GptOssConfig",
        {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 16},
    ),
    "gpt2": ("GPT2Config", {**_GPT, "n_layer": 4}),
    "opt": (
        "OPTConfig",
        {"num_key_value_heads": None, "ffn_dim": 96, "word_embed_proj_dim": 64},
    ),
    "falcon-rope": ("FalconConfig", {**_FALCON, "alibi": False, "multi_query": True}),
    "falcon-alibi": ("FalconConfig", {**_FALCON, "alibi": True, "multi_query": False}),
    "falcon-alibi-mqa": ("FalconConfig", {**_FALCON, "alibi": True, "multi_query": True}),
    "falcon-grouped": (
        "FalconConfig",
        {**_FALCON, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "bloom": ("BloomConfig", {"num_key_value_heads": None, "n_head": 4, "n_layer": 4}),
    "mpt": (
        "MptConfig",
        {"num_key_value_heads": None, "d_model": 64, "n_heads": 4, "max_seq_len": 512},
    ),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 8}),
    "codegen": ("CodeGenConfig", {**_GPT, "rotary_dim": 8, "n_ctx": 512}),
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
