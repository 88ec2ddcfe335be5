"""transformers as the reference for the demo model's numbers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint


def load_reference(path: Path) -> PreTrainedModel:
    """The model of a GGUF file with tied embeddings, as transformers reads it, in float32.

    What AutoModelForCausalLM.from_pretrained(gguf_file=) does, without `accelerate`.
    """
    settings = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    read = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)
    missing, unexpected = model.load_state_dict(read["tensors"], strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model.eval()
