"""A model's shape, from a Hugging Face config.json or from GGUF metadata."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: `kind` is "default", "linear", "llama3" or "yarn"; see layers/rope.py.

    The other fields are those of the kind, named as in Hugging Face's `rope_scaling`.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer of the Llama line.

    family: "llama", "mistral", "qwen2" or "qwen3".
    sliding_window: keys a token sees, 0 = all.
    qkv_bias: Qwen2; o_bias, mlp_bias: some Llama variants; qk_norm: Qwen3.
    """

    family: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    context_len: int
    tie_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int = 0
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def tp_degrees(self) -> tuple[int, ...]:
        """Degrees of tensor parallelism that divide heads, KV heads, MLP and vocabulary evenly."""
        return tuple(
            t
            for t in range(1, self.num_heads + 1)
            if self.num_heads % t == 0
            and self.num_kv_heads % t == 0
            and self.intermediate_size % t == 0
            and self.vocab_size % t == 0
        )
