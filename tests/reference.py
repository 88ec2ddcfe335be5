"""transformers as the reference for the demo model's numbers."""

from __future__ import annotations

import functools
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint


def load_reference(path: Path) -> PreTrainedModel:
    """The model of a GGUF file with tied embeddings, as transformers reads it, in float32.

    What AutoModelForCausalLM.from_pretrained(gguf_file=) does, without `accelerate`.  The file is
    parsed once, not for the config and the weights, and the map of names is made once, not for
    each module: that is half of the time.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        settings = AutoConfig.from_pretrained(path.parent, gguf_file=str(path))
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    missing, unexpected = model.load_state_dict(read["tensors"], strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model.eval()
