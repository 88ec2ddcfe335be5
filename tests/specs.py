"""A group's configuration and a model's facts, small and complete: tests replace what they need."""

from __future__ import annotations

from albireo.ipc.config import EngineConfig, ModelInfo

ENGINE = EngineConfig(
    model_path="",
    device="sim",
    dtype="float32",
    load_format="dummy",
    tp=1,
    max_model_len=64,
    block_size=16,
    num_blocks=64,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    lookahead=1,
    batch_invariant=False,
    step_timeout_s=10.0,
    spin_us=0,
    sim_step_ms=0.0,
)
MODEL = ModelInfo(
    name="tiny",
    architecture="LlamaForCausalLM",
    vocab_size=1000,
    context_len=64,
    eos_token_ids=(),
    bos_token_id=None,
    hidden_size=8,
    num_params=1,
    weight_bytes=1,
    kv_bytes_per_token=1,
    tp_degrees=(1,),
)
