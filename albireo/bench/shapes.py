"""Shapes of well-known models, for benches without their weights.

A shape is a config.json; `write_model` puts it into a directory with a
byte-level tokenizer (workers/tokenizer/stand_in.py), which `--load-format dummy`
can serve.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": tied,
    }


def _gemma3(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int
) -> dict[str, Any]:
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": 262208,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "query_pre_attn_scalar": 168 if layers == 62 else head_dim,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 1024,
        "max_position_embeddings": 131072,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "gemma-3-4b": _gemma3(2560, 10240, 34, 8, 4, 256),
    "gemma-3-27b": _gemma3(5376, 21504, 62, 32, 16, 128),
    "phi-3-mini": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, False),
    "qwen3-30b-a3b": {
        **_qwen3(2048, 6144, 48, 32, False),
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "qwen2.5-32b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
    # For tests: runs anywhere in no time.
    "tiny": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    },
}


def write_model(shape: str, directory: Path) -> None:
    """A model directory without weights.  Raises ValueError for a shape that is not known."""
    if shape not in SHAPES:
        raise ValueError(f"--shape {shape}: not one of {', '.join(SHAPES)}")
    from albireo.workers.tokenizer.stand_in import END_ID, END_TOKEN, stand_in_tokenizer

    config = {"hidden_act": "silu", "torch_dtype": "bfloat16", "eos_token_id": END_ID}
    (directory / "config.json").write_text(json.dumps(config | SHAPES[shape]))
    stand_in_tokenizer(SHAPES[shape]["vocab_size"]).save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_TOKEN}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@contextlib.contextmanager
def shape_directory(shape: str) -> Iterator[str]:
    """write_model's directory, for the block."""
    with tempfile.TemporaryDirectory(prefix="albireo-shape-") as directory:
        write_model(shape, Path(directory))
        yield directory
