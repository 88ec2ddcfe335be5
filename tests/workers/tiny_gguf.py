"""Writes a transformers model as a GGUF file, the way llama.cpp's converter does.

The gguf package says what the file calls each tensor of the checkpoint.
"""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    RopeScalingType,
    get_tensor_name_map,
)
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from transformers import PreTrainedModel

F32 = GGMLQuantizationType.F32
_ARCHITECTURES = {
    "gemma3_text": MODEL_ARCH.GEMMA3,
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "mixtral": MODEL_ARCH.LLAMA,
    "phi3": MODEL_ARCH.PHI3,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)(\..*)")
_TOKENS = [b"<unk>", b"<s>", "</s> é".encode()]


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    weight_type: GGMLQuantizationType = F32,
    fields: dict[str, Any] | None = None,
    rope_factors: list[float] | None = None,
    tokens: list[bytes] = _TOKENS,
    types: list[int] | None = None,
) -> None:
    """weight_type: of the matrices.  fields: added strings and numbers of the architecture.

    types: of the tokens, ggml's numbers.
    """
    config = model.config
    kind = _ARCHITECTURES[config.model_type]
    architecture = MODEL_ARCH_NAMES[kind]
    writer = GGUFWriter(path, architecture)
    _write_shape(writer, config)
    writer.add_token_list(tokens)
    if types is not None:
        writer.add_token_types(types)
    for key, value in (fields or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        add[list] = writer.add_array
        add[type(value)](f"{architecture}.{key}", value)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(rope_factors, np.float32))
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    for name, array in _checkpoint(model).items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        heads = _interleaved_heads(architecture, name, config)
        if heads:
            array = _interleave(array, heads)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            array = array + 1
        if array.ndim == 1 or weight_type == F32:
            writer.add_tensor(stored, np.ascontiguousarray(array))
        else:
            writer.add_tensor(stored, quantize(array, weight_type), raw_dtype=weight_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _checkpoint(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The tensors of the model's own files; the experts of a layer as one."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        files = load_file(Path(directory) / "model.safetensors")
    tensors: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, weight in files.items():
        if found := _EXPERT.match(name):
            before, number, after = found.groups()
            experts.setdefault(before + after, {})[int(number)] = weight.numpy()
        else:
            tensors[name] = weight.numpy()
    for name, each in experts.items():
        tensors[name] = np.stack([each[number] for number in sorted(each)])
    return tensors


def round_weights(model: PreTrainedModel, weight_type: GGMLQuantizationType) -> None:
    """Sets the model's matrices to what is left of them after quantisation."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                rounded = dequantize(quantize(parameter.numpy(), weight_type), weight_type)
                parameter.copy_(torch.from_numpy(rounded))


def _write_shape(writer: GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config.model_type == "phi3":
        _write_phi3(writer, config, head_dim)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
        if rope["full_attention"]["rope_type"] == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["full_attention"]["factor"])
    if config.model_type in ("mixtral", "qwen3_moe"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)


def _write_phi3(writer: GGUFWriter, config: Any, head_dim: int) -> None:
    rope = config.rope_parameters
    writer.add_rope_dimension_count(int(head_dim * rope["partial_rotary_factor"]))
    writer.add_sliding_window(config.sliding_window or 0)
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if rope["rope_type"] == "longrope":
        original = config.original_max_position_embeddings
        stretch = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors((1 + math.log(stretch) / math.log(original)) ** 0.5)
        for length in ("long", "short"):
            factors = np.array(rope[f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)


def _interleaved_heads(architecture: str, name: str, config: Any) -> int:
    if architecture == "llama" and ".q_proj." in name:
        return config.num_attention_heads
    if architecture == "llama" and ".k_proj." in name:
        return config.num_key_value_heads
    return 0


def _interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a head's rows: first, first of the second half, second, ..."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)
