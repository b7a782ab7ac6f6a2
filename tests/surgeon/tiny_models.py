"""Tiny random causal language models of many architectures, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 64

_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _LLAMA_LIKE),
    "mistral": ("Mistral", _LLAMA_LIKE),
    "qwen2": ("Qwen2", {key: value for key, value in _LLAMA_LIKE.items() if key != "head_dim"}),
    "qwen3": ("Qwen3", _LLAMA_LIKE),
    "gemma": ("Gemma", _LLAMA_LIKE),
    "opt": (
        "OPT",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "do_layer_norm_before": True,
        },
    ),
    "gpt_neox": (
        "GPTNeoX",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "use_parallel_residual": True,
        },
    ),
    "phi3": ("Phi3", {key: value for key, value in _LLAMA_LIKE.items() if key != "head_dim"}),
    # Its output head has a bias.
    "phi": (
        "Phi",
        {key: value for key, value in _LLAMA_LIKE.items() if key not in ("head_dim", "num_key_value_heads")},
    ),
    "gpt2": ("GPT2", {"n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}
NAMES = tuple(_CONFIGS)
# Of special kinds, some of them refused.
_CONFIGS |= {
    "mixtral": ("Mixtral", {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_neo": (
        "GPTNeo",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers": 3,
            "num_heads": 4,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 4,
            "max_position_embeddings": 64,
        },
    ),
    "gemma4_text": (
        "Gemma4Text",
        {
            **_LLAMA_LIKE,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "global_head_dim": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
        },
    ),
    # The last blocks attend to keys and values of those before.
    "gemma4_shared": (
        "Gemma4Text",
        {
            **_LLAMA_LIKE,
            "num_hidden_layers": 4,
            "layer_types": 2 * ["sliding_attention", "full_attention"],
            "global_head_dim": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "lru_width": 32,
            "attention_window_size": 8,
        },
    ),
    # Norms after its writers.
    "gemma2": ("Gemma2", {**_LLAMA_LIKE, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    "ctrl": ("CTRL", {"n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A randomly initialized model in evaluation mode; every parameter is random, biases and norms included."""
    prefix, options = _CONFIGS[name]
    config = getattr(transformers, f"{prefix}Config")(
        vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options
    )
    return _random(AutoModelForCausalLM.from_config, config, seed).to(dtype)


def build_multimodal(family: str, seed: int = 0) -> PreTrainedModel:
    """A decoder of ``"gemma3"`` or ``"llava"`` behind a vision tower that is larger than it."""
    vision = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision |= {"image_size": 16, "patch_size": 8}
    if family == "gemma3":
        text = transformers.Gemma3TextConfig(vocab_size=VOCABULARY, sliding_window=8, **_LLAMA_LIKE)
        seen = transformers.SiglipVisionConfig(**vision)
        config = transformers.Gemma3Config(text_config=text, vision_config=seen, mm_tokens_per_image=4)
        return _random(transformers.Gemma3ForConditionalGeneration, config, seed)
    text = transformers.LlamaConfig(vocab_size=VOCABULARY, **_LLAMA_LIKE)
    config = transformers.LlavaConfig(text_config=text, vision_config=transformers.CLIPVisionConfig(**vision))
    return _random(transformers.LlavaForConditionalGeneration, config, seed)


def _random(make: Callable[[Any], PreTrainedModel], config: Any, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(config)
        with torch.no_grad():
            for parameter in model.parameters():
                scale = 0.2 if parameter.ndim > 1 else 0.1
                parameter.copy_(torch.randn_like(parameter) * scale + (parameter if parameter.ndim == 1 else 0.0))
    return model.eval()
