"""The rotary table equals transformers' rotary embedding, for every kind, near and far."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from albireo.workers.layers.rope import frequencies, rope_table
from albireo.workers.models.config import RopeConfig
from albireo.workers.models.hf_config import read_hf_config

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
_YARN_32K = {**_YARN, "original_max_position_embeddings": 32768}
_KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    "llama3": _LLAMA3,
    "yarn": _YARN_32K,
    "yarn-betas": {**_YARN_32K, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-attention-factor": {**_YARN_32K, "attention_factor": 1.5},
    "yarn-mscale": {**_YARN_32K, "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-without-length": _YARN,
    "yarn-factor-1": {**_YARN_32K, "factor": 1.0},
}


def _directory(tmp_path: Path, rope: dict[str, Any], old_style: bool) -> Path:
    """A config.json as transformers 5 writes it, or as transformers 4 did."""
    settings = json.loads(
        LlamaConfig(max_position_embeddings=131072, head_dim=128).to_json_string()
    )
    settings["architectures"] = ["LlamaForCausalLM"]
    del settings["rope_parameters"]
    if old_style:
        theta = rope.get("rope_theta")
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        scaling["type"] = scaling.pop("rope_type")
        settings |= {"rope_theta": theta, "rope_scaling": scaling}
    else:
        settings["rope_parameters"] = rope
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.mark.parametrize("old_style", [False, True])
@pytest.mark.parametrize("kind", _KINDS)
def test_table_equals_transformers(kind: str, old_style: bool, tmp_path: Path) -> None:
    config = read_hf_config(_directory(tmp_path, _KINDS[kind], old_style))
    theirs = LlamaConfig(
        max_position_embeddings=131072, head_dim=128, rope_parameters=dict(_KINDS[kind])
    )
    table = rope_table(config.rope, 128, 131072)
    assert table.shape == (131072, 128)
    assert table.dtype == torch.float32
    positions = torch.cat(
        (torch.arange(100), torch.arange(8000, 8100), torch.arange(130972, 131072))
    )
    embedding = LlamaRotaryEmbedding(theirs)
    assert torch.equal(frequencies(config.rope, 128), embedding.inv_freq)
    cos, sin = embedding(torch.zeros(1), positions.unsqueeze(0))
    torch.testing.assert_close(table[positions, :64], cos[0, :, :64], rtol=0, atol=1e-6)
    torch.testing.assert_close(table[positions, 64:], sin[0, :, :64], rtol=0, atol=1e-6)


def test_frequency_factors_divide() -> None:
    factors = tuple(float(i + 1) for i in range(32))
    plain = frequencies(RopeConfig(theta=1e4), 64)
    divided = frequencies(RopeConfig(theta=1e4, frequency_factors=factors), 64)
    torch.testing.assert_close(divided * torch.tensor(factors), plain)
