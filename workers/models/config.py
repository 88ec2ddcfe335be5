"""A model's shape, from a Hugging Face config.json or from GGUF metadata.

hf_config.py and gguf_config.py make a ModelConfig; everything else only reads
it.  `tensor_shapes` is the one list of a model's tensors: loaders check files
against it, dummy weights are made from it, parameters are counted with it.
Nothing here imports torch, so that the `sim` device starts without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..kernels.cuda.needs import can_be_e4m7

_ROW_PARALLEL = (".o_proj.weight", ".down_proj.weight")
"""Split by their inputs; all others by their outputs (layers/linear.py)."""
_GATED = (".gate_proj.weight", ".up_proj.weight")
"""One weight of both."""


class ModelError(ValueError):
    """A model's files are missing, damaged or not supported; the text says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding; see layers/rope.py.

    kind: "default", "linear", "llama3", "yarn" or "longrope". The other fields are
        those of the kind, named as in Hugging Face's `rope_scaling`.
    rotary_dim: the first dimensions of a head, which alone rotate; 0 = all.
    frequency_factors: [rotary_dim / 2] divisors of the frequencies, applied on top of
        the kind; GGUF files carry llama3 scaling this way. Empty = all ones.
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
    rotary_dim: int = 0
    frequency_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer of the Llama line.

    family: as transformers names it, "llama" or "gemma3_text".
    sliding_window: keys a token sees, 0 = all.
    full_layers: layers whose tokens see all keys although there is a window.
    local_rope: of the layers with a window where theirs is another (Gemma).
    query_pre_attn_scalar: the inverse square of the scores' scale, 0 = head_dim.
    activation: of the MLP's gate, "silu" or "gelu" (approximated by tanh).
    embedding_scale: of the embeddings' rows, not of the tied head's.
    output_norms: what attention and MLP add to the residual stream is normalised (Gemma).
    num_experts: of each layer's MLP, 0 = one dense MLP; the other settings of a mixture:
        expert_size, of an expert's inner layer; experts_per_token, which the router
        picks; normalise_experts: their weights sum up to 1; dense_layers: layers with
        a dense MLP nevertheless.
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
    full_layers: frozenset[int] = frozenset()
    local_rope: RopeConfig | None = None
    query_pre_attn_scalar: float = 0.0
    activation: str = "silu"
    embedding_scale: float = 1.0
    output_norms: bool = False
    num_experts: int = 0
    expert_size: int = 0
    experts_per_token: int = 0
    normalise_experts: bool = False
    dense_layers: frozenset[int] = frozenset()
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def tp_degrees(self) -> tuple[int, ...]:
        """Degrees of tensor parallelism that divide heads, KV heads, MLP and vocabulary evenly."""
        return tuple(
            t
            for t in range(1, self.num_heads + 1)
            if self.num_heads % t == 0
            and self.num_kv_heads % t == 0
            and all(size % t == 0 for size in self.mlp_sizes().values())
            and self.vocab_size % t == 0
        )

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers

    def mlp_sizes(self) -> dict[str, int]:
        """Inner sizes of what there is: "an MLP", "experts"."""
        sizes = {False: ("an MLP", self.intermediate_size), True: ("experts", self.expert_size)}
        sparse = {self.is_sparse(layer) for layer in range(self.num_layers)}
        return dict(sizes[kind] for kind in sorted(sparse))

    def window(self, layer: int) -> int:
        """Keys that a token sees in a layer, 0 = all."""
        return 0 if layer in self.full_layers else self.sliding_window

    def rope_of(self, layer: int) -> RopeConfig:
        """The rotary embedding of a layer."""
        return self.local_rope if self.local_rope and self.window(layer) else self.rope

    def attention_scale(self) -> float:
        """What scores are multiplied by."""
        return float((self.query_pre_attn_scalar or self.head_dim) ** -0.5)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by their names, in the order of the forward pass.

        Names are Llama's in Hugging Face files, whatever a family's files call and
        fuse them (stored.py): "post_attention_layernorm" is the norm before the MLP.
        A linear layer's weight is [out, in].
        Without "lm_head.weight" where embeddings are tied.
        """
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden)
        }
        for layer in range(self.num_layers):
            for name, shape in self._layer_shapes(layer).items():
                shapes[f"model.layers.{layer}.{name}"] = shape
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def products(self) -> Iterator[tuple[int, str, float]]:
        """(layer, module, multiplications for a token) of the layers' linear layers.

        module: such as "self_attn.q_proj".  Of experts, those that are picked for a token.
        """
        for layer in range(self.num_layers):
            for name, shape in self._layer_shapes(layer).items():
                if len(shape) == 2:
                    picked = (
                        self.experts_per_token / self.num_experts if ".experts." in name else 1.0
                    )
                    yield layer, name.removesuffix(".weight"), picked * math.prod(shape)

    def e4m7_params(self, tp: int) -> int:
        """Weights of linear layers, experts not among them, and of the LM head that can have 12
        bits (kernels/cuda/e4m7.py), of all `tp` ranks: their shapes depend on how many there are.
        """
        # A tied head is a copy of the embeddings, of which only rows are read.
        shapes = self.tensor_shapes() | {"lm_head.weight": (self.vocab_size, self.hidden_size)}
        del shapes["model.embed_tokens.weight"]
        total = 0
        for name, shape in shapes.items():
            if len(shape) != 2 or ".experts." in name:
                continue
            n, k = shape
            if name.endswith(_ROW_PARALLEL):
                packable = can_be_e4m7(n, k // tp)
            else:
                packable = can_be_e4m7(n // tp * (2 if name.endswith(_GATED) else 1), k)
            total += n * k * packable
        return total

    def layer_products(self) -> int:
        """Multiplications for a token in the linear layers of a layer, on average."""
        return int(sum(each for *_, each in self.products()) / self.num_layers)

    def num_params(self) -> int:
        """Number of weights, tied embeddings counted once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def _layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        hidden = self.hidden_size
        q_rows, kv_rows = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
        for name, out, into, bias in (
            ("self_attn.q_proj", q_rows, hidden, self.qkv_bias),
            ("self_attn.k_proj", kv_rows, hidden, self.qkv_bias),
            ("self_attn.v_proj", kv_rows, hidden, self.qkv_bias),
            ("self_attn.o_proj", hidden, q_rows, self.o_bias),
            *self._mlp_layers(layer),
        ):
            shapes[f"{name}.weight"] = (out, into)
            if bias:
                shapes[f"{name}.bias"] = (out,)
        if self.qk_norm:
            shapes["self_attn.q_norm.weight"] = (self.head_dim,)
            shapes["self_attn.k_norm.weight"] = (self.head_dim,)
        shapes["post_attention_layernorm.weight"] = (hidden,)
        if self.output_norms:
            shapes["attention_output_norm.weight"] = (hidden,)
            shapes["mlp_output_norm.weight"] = (hidden,)
        return shapes

    def _mlp_layers(self, layer: int) -> list[tuple[str, int, int, bool]]:
        """(name, outputs, inputs, has a bias) of the linear layers of an MLP."""
        hidden = self.hidden_size
        if self.is_sparse(layer):
            size, bias = self.expert_size, False
            modules = [f"mlp.experts.{expert}" for expert in range(self.num_experts)]
            linear = [("mlp.gate", self.num_experts, hidden, False)]
        else:
            size, bias, modules, linear = self.intermediate_size, self.mlp_bias, ["mlp"], []
        for module in modules:
            linear.append((f"{module}.gate_proj", size, hidden, bias))
            linear.append((f"{module}.up_proj", size, hidden, bias))
            linear.append((f"{module}.down_proj", hidden, size, bias))
        return linear
