"""Tiny random models of every family, saved as transformers saves them.

Weights are large enough, and norms and biases random enough, that a part left
out or put in the wrong place moves the logits by far more than a test allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 96
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_THREE = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
_PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
_PARTIAL_LONGROPE = {
    **_LONGROPE,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + i / 8 for i in range(6)],
    "long_factor": [2.0 + i for i in range(6)],
}
_MIXTURE = {
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
}
_GEMMA = {
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
_ALL_SLIDING = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}


def draw_weights(model: PreTrainedModel, std: float) -> None:
    """Norms between 0.5 and 1.5, all others of a normal distribution."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=std)


@dataclass(frozen=True, slots=True)
class Tiny:
    """One model: its transformers config, and the TP degree it is also run with."""

    config_class: type[PreTrainedConfig]
    settings: dict[str, Any]
    tp: int = 2

    def build(self, seed: int = 0) -> PreTrainedModel:
        """The transformers model, in float32."""
        torch.manual_seed(seed)
        config = self.config_class(**{**_COMMON, **self.settings})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model.float().eval()
        draw_weights(model, 0.2)
        return model


TINY: dict[str, Tiny] = {
    "gemma3": Tiny(Gemma3TextConfig, _GEMMA),
    "gemma3-period": Tiny(
        Gemma3TextConfig,
        {
            **{key: value for key, value in _GEMMA.items() if key != "layer_types"},
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 32,
            "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}},
        },
    ),
    "gemma3-untied": Tiny(
        Gemma3TextConfig,
        {**_THREE, "tie_word_embeddings": False, "attention_bias": True, "sliding_window": 5},
        tp=3,
    ),
    "llama": Tiny(LlamaConfig, {}),
    "llama-tied": Tiny(LlamaConfig, {"tie_word_embeddings": True}),
    "llama-biases": Tiny(LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-no-gqa": Tiny(LlamaConfig, {"num_key_value_heads": 4}, tp=4),
    "llama-wide-heads": Tiny(LlamaConfig, {"head_dim": 32}),
    "llama-3-ranks": Tiny(LlamaConfig, {**_THREE, "tie_word_embeddings": True}, tp=3),
    "llama3-rope": Tiny(LlamaConfig, {"rope_parameters": _LLAMA3}),
    "linear-rope": Tiny(LlamaConfig, {"rope_parameters": _LINEAR}),
    "yarn-rope": Tiny(LlamaConfig, {"rope_parameters": _YARN}),
    "mistral": Tiny(MistralConfig, {"sliding_window": None}),
    "mistral-window": Tiny(MistralConfig, {"sliding_window": 5}),
    "phi3": Tiny(Phi3Config, {}),
    "phi3-mini": Tiny(Phi3Config, {"hidden_size": 96, "num_attention_heads": 2}),
    "phi3-window": Tiny(Phi3Config, {"sliding_window": 9, "tie_word_embeddings": True}),
    "phi3-partial": Tiny(Phi3Config, {"rope_parameters": _PARTIAL}),
    "phi3-longrope": Tiny(
        Phi3Config, {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 100}
    ),
    "phi4-mini": Tiny(
        Phi3Config, {"rope_parameters": _PARTIAL_LONGROPE, "original_max_position_embeddings": 100}
    ),
    "qwen2": Tiny(Qwen2Config, {**_THREE}, tp=3),
    "qwen2-tied": Tiny(Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-window": Tiny(Qwen2Config, _ALL_SLIDING),
    "qwen2-two-kinds": Tiny(Qwen2Config, {**_ALL_SLIDING, "max_window_layers": 2}),
    "qwen2-yarn": Tiny(Qwen2Config, {"rope_parameters": _YARN}),
    "qwen3": Tiny(Qwen3Config, {"head_dim": 32}),
    "mixtral": Tiny(MixtralConfig, {"num_local_experts": 5}),
    "mixtral-window": Tiny(
        MixtralConfig,
        {**_THREE, "num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 6},
        tp=3,
    ),
    "qwen3-moe": Tiny(Qwen3MoeConfig, {**_MIXTURE, "norm_topk_prob": True}),
    "qwen3-moe-plain": Tiny(Qwen3MoeConfig, {**_MIXTURE, "num_experts": 3}),
    "qwen3-moe-mixed": Tiny(
        Qwen3MoeConfig, {**_MIXTURE, "mlp_only_layers": [0], "norm_topk_prob": True}
    ),
    "qwen3-biases": Tiny(Qwen3Config, {"head_dim": 16, "attention_bias": True}),
}


def save(name: str, directory: Path, **options: Any) -> PreTrainedModel:
    """Saves the tiny model `name` as safetensors; options go to save_pretrained."""
    model = TINY[name].build()
    model.save_pretrained(directory, **options)
    return model


def prompts(lengths: tuple[int, ...] = (1, 40, 7, 90, 17), seed: int = 1) -> list[list[int]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


def expected_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """transformers' logits at every position, [len(tokens), vocab] float32."""
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float()
