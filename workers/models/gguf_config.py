"""A GGUF file's metadata -> ModelConfig.

Called by `load.read_config`.  llama.cpp's converters write Llama and Mistral
alike as architecture "llama".  Shapes and flags that have no field are read off
the tensors: the vocabulary's size, which layers have biases, whether the output
layer is tied to the embeddings.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .config import ModelConfig, ModelError, RopeConfig
from .gguf_file import GGUFFile
from .hf_settings import number_above_zero

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_HEAD_DIMS = ("attention.value_length", "rope.dimension_count")
_F32 = 0


def read_gguf_config(path: Path) -> ModelConfig:
    """Raises ModelError when the file holds no model that the layers can run."""
    file = GGUFFile(path)
    family = file.get("general.architecture")
    if family not in _ARCHITECTURES:
        raise ModelError(
            f"{path}: architecture {family!r} is not supported; supported in GGUF files are "
            f"{', '.join(_ARCHITECTURES)}"
        )
    fields = _Fields(file, family)
    hidden = fields.count("embedding_length")
    heads = fields.count("attention.head_count")
    kv_heads = fields.count("attention.head_count_kv", heads)
    head_dim = fields.count("attention.key_length", hidden // heads)
    rotary_dim = fields.count("rope.dimension_count", head_dim)
    same = ["attention.value_length"] if family == "phi3" else list(_HEAD_DIMS)
    for key in same:
        if fields.count(key, head_dim) != head_dim:
            raise fields.error(key, f"other than the head's dimension {head_dim} is not supported")
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise fields.error("rope.dimension_count", f"does not fit heads of {head_dim}")
    if fields.get("expert_count", 0):
        raise fields.error("expert_count", "mixtures of experts are not supported")
    if heads % kv_heads or head_dim % 2:
        raise fields.error(
            "attention.head_count", f"does not fit {kv_heads} KV heads of {head_dim}"
        )
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{path}: has no tensor token_embd.weight: it holds no whole model")
    rope = _rope(fields, rotary_dim)
    if rotary_dim < head_dim:
        rope = replace(rope, rotary_dim=rotary_dim)
    return ModelConfig(
        family=family,
        architecture=_ARCHITECTURES[family],
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        intermediate_size=fields.count("feed_forward_length"),
        num_layers=fields.count("block_count"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon", 1e-5),
        rope=rope,
        context_len=_context_len(fields, rope),
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        sliding_window=fields.get("attention.sliding_window", 0),
        eos_token_ids=_eos_token_ids(file),
        bos_token_id=file.get("tokenizer.ggml.bos_token_id"),
    )


class _Fields:
    """The fields of one architecture ("llama.block_count"); errors name the file and the field."""

    def __init__(self, file: GGUFFile, family: str) -> None:
        self.file = file
        self._prefix = family + "."

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.get(self._prefix + key, default)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or value < 1:
            raise self.error(key, "a whole number above 0 is needed")
        return value

    def number(self, key: str, default: float) -> float:
        return number_above_zero(self.file.path, self._prefix + key, self.get(key, default))

    def error(self, key: str, what: str) -> ModelError:
        return ModelError(f"{self.file.path}: {self._prefix}{key} is {self.get(key)!r}: {what}")


def _eos_token_ids(file: GGUFFile) -> tuple[int, ...]:
    """End of text, and end of turn where the file tells them apart."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    found = [file.get(key) for key in keys]
    return tuple(dict.fromkeys(token for token in found if token is not None))


def _context_len(fields: _Fields, rope: RopeConfig) -> int:
    """With LongRoPE the original length, up to which it is exact (hf_config.py says why)."""
    length = fields.count("context_length")
    return min(length, rope.original_max_position_embeddings) if rope.kind == "longrope" else length


def _rope(fields: _Fields, rotary_dim: int) -> RopeConfig:
    theta = fields.number("rope.freq_base", 10000.0)
    kind = fields.get("rope.scaling.type", "none")
    short = _frequency_factors(fields.file, "rope_factors_short.weight", rotary_dim)
    if short:
        context_len = fields.count("context_length")
        return RopeConfig(
            kind="longrope",
            theta=theta,
            original_max_position_embeddings=fields.count(
                "rope.scaling.original_context_length", context_len
            ),
            attention_factor=fields.number("rope.scaling.attn_factor", 1.0),
            frequency_factors=short,
        )
    factors = _frequency_factors(fields.file, "rope_freqs.weight", rotary_dim)
    if kind == "none":
        return RopeConfig(theta=theta, frequency_factors=factors)
    factor = fields.number("rope.scaling.factor", 1.0)
    if kind == "linear":
        return RopeConfig(kind=kind, theta=theta, factor=factor, frequency_factors=factors)
    if kind != "yarn":
        raise fields.error("rope.scaling.type", "supported are none, linear and yarn")
    if fields.get("rope.scaling.yarn_log_multiplier", 0.0):
        raise fields.error("rope.scaling.yarn_log_multiplier", "is not supported")
    context_len = fields.count("context_length")
    attention_factor = fields.number("rope.scaling.attn_factor", 1.0)
    return RopeConfig(
        kind=kind,
        theta=theta,
        factor=factor,
        original_max_position_embeddings=fields.count(
            "rope.scaling.original_context_length", context_len
        ),
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
        # ggml multiplies the paper's factor by the file's.
        attention_factor=attention_factor * (0.1 * math.log(max(factor, 1.0)) + 1),
        frequency_factors=factors,
    )


def _frequency_factors(file: GGUFFile, name: str, rotary_dim: int) -> tuple[float, ...]:
    """The divisors of the rotary frequencies in tensor `name`, none without it.

    Llama 3.1 and later have "rope_freqs.weight", Phi-3 "rope_factors_short.weight".
    """
    tensor = file.tensors.get(name)
    if tensor is None:
        return ()
    if tensor.shape != (rotary_dim // 2,) or tensor.type != _F32:
        raise ModelError(
            f"{file.path}: tensor {name} has shape {tensor.shape} and type "
            f"{tensor.type}; ({rotary_dim // 2},) and type {_F32} (F32) are expected"
        )
    return tuple(file.data(tensor, rotary_dim // 2 * 4).view(np.float32).tolist())
