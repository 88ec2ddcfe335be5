"""The decoder-only transformer of the Llama line: Llama, Mistral, Mixtral, Phi-3, Qwen, Gemma 3.

    x = embed(tokens)
    for each layer:
        x = x + attention(norm(x))
        x = x + mlp(norm(x))
    logits = head(norm(x))

Families differ in ModelConfig's flags only, and linear layers find out by
themselves which biases there are.  Each sum is fused with the norm after it: x
is kept as a residual stream and what is still to be added to it, of which each
rank of several has a share.  Gemma normalises that, too, x = x +
norm(attention(norm(x))): in the same kernel.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..engine.batch import StepBatch
from ..kernels.interface import KVLayer
from ..layers.attention import Attention, AttentionShape
from ..layers.embedding import LMHead, VocabParallelEmbedding
from ..layers.mixture import MixtureOfExperts
from ..layers.mlp import MLP
from ..layers.norm import RMSNorm
from ..layers.rank import Rank
from ..layers.weights import Weights
from ..parallel.communicator import Communicator
from .config import ModelConfig, RopeConfig


def attention_shape(config: ModelConfig, layer: int) -> AttentionShape:
    """What the attention of a layer needs of the config."""
    return AttentionShape(
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rotary_dim=config.rope_of(layer).rotary_dim or config.head_dim,
        scale=config.attention_scale(),
        window=config.window(layer),
        qk_norm=config.qk_norm,
        norm_eps=config.rms_norm_eps,
    )


class DecoderLayer:
    """Attention and MLP, each with its norm before it, and in Gemma one behind it.

    before: the output_norm of the layer before.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        weights: Weights,
        rope: torch.Tensor,
        rank: Rank,
        before: RMSNorm | None,
    ) -> None:
        eps = config.rms_norm_eps
        self._before = before
        self._attention_norm = RMSNorm(weights.at("input_layernorm"), eps, rank)
        shape = attention_shape(config, layer)
        self._attention = Attention(weights.at("self_attn"), shape, rope, rank)
        self._mlp_norm = RMSNorm(weights.at("post_attention_layernorm"), eps, rank)
        self._mlp: MLP | MixtureOfExperts
        if config.is_sparse(layer):
            self._mlp = MixtureOfExperts(
                weights.at("mlp"),
                config.num_experts,
                config.experts_per_token,
                config.normalise_experts,
                rank,
            )
        else:
            self._mlp = MLP(weights.at("mlp"), config.activation, rank)
        self._attention_norm.feeds(self._attention.reads)
        self._mlp_norm.feeds(self._mlp.reads)
        self._of_attention = self.output_norm = None
        if config.output_norms:
            self._of_attention = RMSNorm(weights.at("attention_output_norm"), eps, rank)
            self.output_norm = RMSNorm(weights.at("mlp_output_norm"), eps, rank)

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        batch: StepBatch,
        kv: KVLayer,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds x, then the attention's output, to `residual`; returns the MLP's output, and it.

        What is added is normalised where there is a norm for it; whoever adds the MLP's
        output does that with `output_norm`.  rows: those that are wanted, see Attention.
        """
        x = self._attention_norm.add(x, residual, self._before)
        x = self._attention(x, batch, kv, rows)
        if rows is not None:
            residual = residual.index_select(0, rows)
        return self._mlp(self._mlp_norm.add(x, residual, self._of_attention)), residual

    def cache(self, x: torch.Tensor, residual: torch.Tensor, batch: StepBatch, kv: KVLayer) -> None:
        """Only writes the keys and values: all that is wanted of a last layer without logits."""
        self._attention.cache(self._attention_norm.add(x, residual, self._before), batch, kv)


class Model:
    """One rank's share of a model; load.py adds the layers one by one.

    ropes: [config.context_len, head_dim] float32 for each of the config's, see layers/rope.py.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        ropes: Mapping[RopeConfig, torch.Tensor],
        rank: Rank,
    ) -> None:
        self.config = config
        self.rank = rank.index
        self.tp = rank.size
        self._place = rank
        self._ropes = ropes
        self._embed = VocabParallelEmbedding(
            weights.at("model.embed_tokens"), rank, config.embedding_scale
        )
        self._layers: list[DecoderLayer] = []
        self._norm = RMSNorm(weights.at("model.norm"), config.rms_norm_eps, rank)
        head = "model.embed_tokens" if config.tie_embeddings else "lm_head"
        self._head = LMHead(weights.at(head), rank)
        self._norm.feeds(self._head.reads)

    def add_layer(self, weights: Weights) -> None:
        """Adds the next layer; its weights may be forgotten afterwards."""
        layer = len(self._layers)
        rope = self._ropes[self.config.rope_of(layer)]
        before = self._output_norm
        self._layers.append(DecoderLayer(self.config, layer, weights, rope, self._place, before))

    @property
    def communicator(self) -> Communicator:
        """The way to the other ranks; with tp > 1 set by the worker before the first step."""
        return self._place.communicator

    @communicator.setter
    def communicator(self, communicator: Communicator) -> None:
        self._place.communicator = communicator

    def forward(self, batch: StepBatch, kv: list[KVLayer], is_brief: bool = False) -> torch.Tensor:
        """Logits of batch.sample_rows over this rank's ids, [R, vocab_size / tp] float32.

        kv: the cache of each layer; this step's keys and values are written to it.
        is_brief: only to have launched what this launches, by a layer of each kind and the last.
        """
        x = self._embed(batch.tokens)
        residual = torch.zeros_like(x)
        *layers, last = zip(self._layers, kv, strict=True)
        if is_brief:
            layers = [layers[i] for i in self._first_of_each_kind() if i < len(layers)]
        for layer, cache in layers:
            x, residual = layer(x, residual, batch, cache)
        layer, cache = last
        rows = batch.sample_rows
        if not len(rows):
            layer.cache(x, residual, batch, cache)
            return x.new_empty((0, self.config.vocab_size // self.tp), dtype=torch.float32)
        # Behind the last layer's keys and values only they count: most of a prompt stops here.
        all_of_them = not batch.num_chunks and len(rows) == len(x)  # And in their order.
        x, residual = layer(x, residual, batch, cache, None if all_of_them else rows)
        return self._head(self._norm.add(x, residual, self._output_norm))

    def layers_of_each_kind(self, batch: StepBatch, kv: list[KVLayer], head: bool) -> None:
        """Only to have launched what all layers launch for so many rows, and the LM head if all of
        them sample; see forward()."""
        x = self._embed(batch.tokens)
        residual = torch.zeros_like(x)
        for i in self._first_of_each_kind():
            x, residual = self._layers[i](x, residual, batch, kv[i])
        if head:
            self._head(self._norm.add(x, residual, self._output_norm))

    def _first_of_each_kind(self) -> list[int]:
        """Layers that launch other kernels than those before them: dense, of experts, windowed.

        By the config alone, so that all ranks run the same ones, which sum together.
        """
        config = self.config
        kinds = {
            (config.is_sparse(i), config.window(i) > 0): i
            for i in reversed(range(len(self._layers)))
        }
        return sorted(kinds.values())

    @property
    def _output_norm(self) -> RMSNorm | None:
        """Of what the last layer adds."""
        return self._layers[-1].output_norm if self._layers else None
