"""What GGUF files call a model's tensors; called by load.py.

A layer's experts are one tensor, [experts, out, in].
"""

from __future__ import annotations

from dataclasses import replace

from .config import ModelConfig
from .stored import Stored, own_tensors, split_name

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "attention_output_norm": "post_attention_norm",
    "mlp_output_norm": "post_ffw_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_EXPERTS = "mlp.experts."


def _gguf_name(name: str) -> str:
    """The GGUF name of a tensor: "model.layers.0.mlp.up_proj.weight" -> "blk.0.ffn_up.weight"."""
    block, module, kind = split_name(name)
    if block:
        block = f"blk.{block.split('.')[2]}."
    return f"{block}{_NAMES[module]}.{kind}"


def gguf_tensors(config: ModelConfig) -> dict[str, Stored]:
    """Where a GGUF file keeps the tensors of config.tensor_shapes()."""
    tensors = {}
    for name, stored in own_tensors(config).items():
        block, module, kind = split_name(name)
        if module.startswith(_EXPERTS):
            expert, projection = module.removeprefix(_EXPERTS).split(".")
            rows, columns = stored.shape
            tensors[name] = Stored(
                _gguf_name(f"{block}{_EXPERTS}{projection}.{kind}"),
                (config.num_experts, rows, columns),
                first=int(expert) * rows,
                rows=rows,
            )
        else:
            tensors[name] = replace(stored, name=_gguf_name(stored.name))
    return tensors
