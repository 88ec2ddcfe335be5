"""A GGUF file's metadata -> ModelConfig.

Called by `load.read_config`.  llama.cpp's converters write Llama, Mistral and
Mixtral alike as architecture "llama".  Shapes and flags that have no field are
read off the tensors: the vocabulary's size, which layers have biases or
experts, whether the output layer is tied to the embeddings.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from .config import ModelConfig, ModelError, RopeConfig
from .gguf_ends import end_token_ids
from .gguf_fields import Fields
from .gguf_file import GGUFFile
from .gguf_gemma3 import gemma3_fields
from .gguf_rope import read_gguf_rope

_FAMILIES = {
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "llama": ("llama", "LlamaForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}
"""By the file's architecture: family and architecture as transformers names them."""

_MIXTURES = {"llama": ("mixtral", "MixtralForCausalLM"), "qwen3moe": _FAMILIES["qwen3moe"]}
_HEAD_DIMS = ("attention.value_length", "rope.dimension_count")
_SOFTMAX = 1


def read_gguf_config(path: Path) -> ModelConfig:
    """Raises ModelError when the file holds no model that the layers can run."""
    file = GGUFFile(path)
    kind = file.get("general.architecture")
    if kind not in _FAMILIES:
        raise ModelError(
            f"{path}: architecture {kind!r} is not supported; supported in GGUF files are "
            f"{', '.join(_FAMILIES)}"
        )
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{path}: has no tensor token_embd.weight: it holds no whole model")
    fields = Fields(file, kind)
    layers = fields.count("block_count")
    hidden = fields.count("embedding_length")
    heads = fields.count("attention.head_count")
    kv_heads = fields.count("attention.head_count_kv", heads)
    head_dim, rotary_dim = _head_dims(fields, kind, heads, kv_heads, hidden)
    rope = read_gguf_rope(fields, rotary_dim)
    if rotary_dim < head_dim:
        rope = replace(rope, rotary_dim=rotary_dim)
    experts = _experts(fields, kind)
    own = gemma3_fields(fields, layers, hidden, heads, head_dim) if kind == "gemma3" else {}
    family, architecture = (_MIXTURES if experts else _FAMILIES)[kind]
    return ModelConfig(
        family=family,
        architecture=architecture,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        intermediate_size=fields.count("feed_forward_length"),
        num_layers=layers,
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
        **experts,
        **own,
        eos_token_ids=end_token_ids(file),
        bos_token_id=file.get("tokenizer.ggml.bos_token_id"),
    )


def _head_dims(
    fields: Fields, kind: str, heads: int, kv_heads: int, hidden: int
) -> tuple[int, int]:
    """Dimensions of a head, and how many of them rotate."""
    head_dim = fields.count("attention.key_length", hidden // heads)
    rotary_dim = fields.count("rope.dimension_count", head_dim)
    for key in _HEAD_DIMS[:1] if kind == "phi3" else _HEAD_DIMS:
        if fields.count(key, head_dim) != head_dim:
            raise fields.error(key, f"other than the head's dimension {head_dim} is not supported")
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise fields.error("rope.dimension_count", f"does not fit heads of {head_dim}")
    if heads % kv_heads or head_dim % 2:
        raise fields.error(
            "attention.head_count", f"does not fit {kv_heads} KV heads of {head_dim}"
        )
    return head_dim, rotary_dim


def _experts(fields: Fields, kind: str) -> dict[str, Any]:
    """ModelConfig's settings of a mixture of experts, none for a dense model.

    A file says nothing of the weights' sum, which both architectures make 1, nor
    of dense layers, which they do not have.
    """
    if not fields.get("expert_count", 0):
        return {}
    if kind not in _MIXTURES:
        raise fields.error("expert_count", f"experts are not supported in {kind} files")
    if fields.get("expert_gating_func", _SOFTMAX) != _SOFTMAX:
        raise fields.error("expert_gating_func", f"only {_SOFTMAX} (softmax) is supported")
    if fields.get("expert_shared_count", 0):
        raise fields.error("expert_shared_count", "shared experts are not supported")
    count, chosen = fields.count("expert_count"), fields.count("expert_used_count")
    if chosen > count:
        raise fields.error("expert_used_count", f"exceeds the {count} experts")
    dense = fields.count("feed_forward_length")
    return {
        "num_experts": count,
        "expert_size": fields.count("expert_feed_forward_length", dense),
        "experts_per_token": chosen,
        "normalise_experts": True,
    }


def _context_len(fields: Fields, rope: RopeConfig) -> int:
    """With LongRoPE the original length, up to which it is exact (hf_config.py says why)."""
    length = fields.count("context_length")
    return min(length, rope.original_max_position_embeddings) if rope.kind == "longrope" else length
