"""Gemma 3: checkpoints that also see images, old and new settings, and what is folded at load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedModel,
)
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3RMSNorm,
    Gemma3TextScaledWordEmbedding,
)

from albireo.workers.kernels import create
from albireo.workers.layers.embedding import VocabParallelEmbedding
from albireo.workers.layers.norm import RMSNorm
from albireo.workers.layers.rank import Rank
from albireo.workers.models.config import ModelConfig, ModelError, RopeConfig
from albireo.workers.models.load import load_model, read_config
from albireo.workers.models.safetensors_weights import SafetensorsWeights
from albireo.workers.models.stored import hf_tensors
from albireo.workers.models.weights import LoadingWeights

from .paged_run import PagedRun
from .tiny_gguf import write_gguf
from .tiny_models import TINY, Tiny, expected_logits, prompts, save

_TOLERANCE = 1e-4
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}


def read(directory: Path, settings: dict[str, Any]) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(settings))
    return read_config(directory)


def test_the_text_part_of_a_model_that_also_sees_images(tmp_path: Path) -> None:
    text = TINY["gemma3"].build()
    whole = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text.config.to_dict(), vision_config=_VISION)
    )
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.save_pretrained(tmp_path)
    assert "vision_tower.post_layernorm.weight" in load_file(tmp_path / "model.safetensors")
    kernels = create("cpu", torch.float32, batch_invariant=False)
    models = load_model(
        tmp_path, read_config(tmp_path), torch.float32, "auto", 2, kernels, lambda _: None
    )
    found = PagedRun(models, kernels, torch.float32, prompts()).logits()
    for logits, tokens in zip(found, prompts(), strict=True):
        torch.testing.assert_close(logits, expected_logits(text, tokens), rtol=0, atol=_TOLERANCE)


def test_what_the_files_leave_to_transformers(tmp_path: Path) -> None:
    config = read(tmp_path, _4B)
    theirs = Gemma3Config.from_pretrained(tmp_path).text_config
    assert config.vocab_size == theirs.vocab_size == 262208
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.context_len == theirs.max_position_embeddings
    assert config.eos_token_ids == (1, 106)
    assert config.bos_token_id == 2
    assert config.tie_embeddings
    kinds = ["sliding_attention" if config.window(i) else "full_attention" for i in range(34)]
    assert kinds == theirs.layer_types
    assert config.window(0) == 1024
    for layer, kind in enumerate(kinds):
        rope, expected = config.rope_of(layer), theirs.rope_parameters[kind]
        assert rope.theta == expected["rope_theta"]
        assert rope.kind == expected["rope_type"]
        assert rope.factor == expected.get("factor", 1.0)


def test_settings_of_transformers_4_and_5_say_the_same(tmp_path: Path) -> None:
    old = {
        **_4B["text_config"],
        "architectures": ["Gemma3ForCausalLM"],
        "rope_theta": 500000.0,
        "rope_local_base_freq": 5000.0,
        "sliding_window_pattern": 3,
    }
    found = read(tmp_path, old)
    new = json.loads(Gemma3Config(text_config=old).text_config.to_json_string())
    assert "rope_theta" not in new and "layer_types" in new
    assert read(tmp_path, {**new, "architectures": ["Gemma3ForCausalLM"]}) == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported, only"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping 30\.0 is not supported"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention True is not"),
        ({"sliding_window": None}, "sliding_window is None, but has to be a whole number"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0, but has to be a number above"),
        ({"layer_types": ["full_attention"]}, "for each of 34 layers"),
        ({"rope_scaling": [8.0]}, r"rotary settings are \[8\.0\], but have to be an object"),
    ],
)
def test_unsupported_settings_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        read(tmp_path, {**_4B, "text_config": {**_4B["text_config"], **settings}})


def gguf_config(path: Path, model: PreTrainedModel, **options: Any) -> ModelConfig:
    write_gguf(model, path / "model.gguf", **options)
    return read_config(path / "model.gguf")


def test_windows_of_a_gguf_file(tmp_path: Path) -> None:
    def windows(**fields: Any) -> list[int]:
        named = {key.replace("__", "."): value for key, value in fields.items()}
        config = gguf_config(tmp_path, model, fields=named)
        return [config.window(layer) for layer in range(config.num_layers)]

    model = TINY["gemma3-period"].build()
    assert windows() == [9, 9, 9, 9, 9, 0, 9]
    assert windows(attention__sliding_window_pattern=2) == [9, 0, 9, 0, 9, 0, 9]
    kinds = [True, False, False, True, True, True, False]
    assert windows(attention__sliding_window_pattern=kinds) == [9, 0, 0, 9, 9, 9, 0]
    with pytest.raises(ModelError, match="7 entries are needed, one for each layer"):
        windows(attention__sliding_window_pattern=kinds[1:])
    with pytest.raises(ModelError, match=r"gemma3\.final_logit_softcapping is 30\.0: is not"):
        windows(final_logit_softcapping=30.0)


def test_ropes_of_a_gguf_file(tmp_path: Path) -> None:
    fields = {"rope.freq_base_swa": 5000.0}
    config = gguf_config(tmp_path, TINY["gemma3-period"].build(), fields=fields)
    assert config.rope_of(0) == RopeConfig(theta=5000.0)
    assert config.rope_of(5) == RopeConfig(kind="linear", theta=1e6, factor=8.0)


def test_the_largest_model_has_a_scale_of_its_own(tmp_path: Path) -> None:
    """A GGUF file does not have it; llama.cpp goes by the number of layers, and so do we."""
    large = {**TINY["gemma3-period"].settings, "num_hidden_layers": 62}
    config = gguf_config(tmp_path, Tiny(Gemma3TextConfig, large).build())
    assert config.attention_scale() == 16**-0.5  # hidden size 64, 4 heads of 32
    assert gguf_config(tmp_path, TINY["gemma3-period"].build()).attention_scale() == 32**-0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_embedding_and_norm_round_as_transformers_do(dtype: torch.dtype, tmp_path: Path) -> None:
    """Folded at load, with the same bits: the scale in the model's dtype, the norm in float32."""
    model = save("gemma3", tmp_path).to(dtype)
    config = read_config(tmp_path)
    kernels = create("cpu", dtype, batch_invariant=False)
    weights = LoadingWeights(SafetensorsWeights(tmp_path), hf_tensors(config), dtype)
    rank = Rank(0, 1, kernels)
    tokens = torch.arange(config.vocab_size, dtype=torch.int32)
    embedding = VocabParallelEmbedding(
        weights.at("model.embed_tokens"), rank, config.embedding_scale
    )
    theirs = model.model.embed_tokens
    assert isinstance(theirs, Gemma3TextScaledWordEmbedding)
    x = embedding(tokens)
    assert torch.equal(x, theirs(tokens.long()))
    head = weights.at("model.embed_tokens")["weight"]
    assert torch.equal(head, theirs.weight), "the tied head reads what the file has"

    norm = RMSNorm(weights.at("model.norm"), config.rms_norm_eps, rank)
    stored = load_file(tmp_path / "model.safetensors")["model.norm.weight"]
    wide = Gemma3RMSNorm(config.hidden_size, config.rms_norm_eps)
    wide.weight.data = stored
    tolerance = {torch.bfloat16: 2**-8, torch.float32: 1e-6}[dtype]
    normed = norm.add(x, torch.zeros_like(x)).float()
    torch.testing.assert_close(normed, wide(x.float()), rtol=tolerance, atol=0)
