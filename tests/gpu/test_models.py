"""Families with something of their own on a GPU: transformers' logits at every position."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

from albireo.workers.kernels import create  # noqa: E402
from albireo.workers.models.load import load_model, read_config  # noqa: E402

from ..workers.paged_run import PagedRun  # noqa: E402
from ..workers.tiny_models import TINY, expected_logits, prompts, save  # noqa: E402


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("name", ["gemma3", "gemma3-untied", "phi3-mini", "mixtral", "qwen3-moe"])
def test_logits_equal_transformers(name: str, invariant: bool, tmp_path: Path) -> None:
    kernels = create("cuda", torch.float32, invariant)
    reference = save(name, tmp_path)
    expected = [expected_logits(reference, tokens) for tokens in prompts()]
    config = read_config(tmp_path)
    for tp in (1, TINY[name].tp):
        models = load_model(tmp_path, config, torch.float32, "auto", tp, kernels, lambda _: None)
        found = PagedRun(models, kernels, torch.float32, prompts(), seed=tp).logits()
        for logits, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
