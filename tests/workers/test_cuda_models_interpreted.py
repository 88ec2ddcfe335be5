"""Models on the CUDA kernels, in Triton's interpreter, give the logits of transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from albireo.bench.shapes import write_model
from albireo.workers.models.load import load_model, read_config

from .interpreted import use_interpreter
from .paged_run import PagedRun, dummy_logits
from .tiny_models import expected_logits, prompts, save

use_interpreter()

from albireo.workers.kernels.cuda.kernels import CudaKernels  # noqa: E402


@pytest.mark.parametrize("name", ["gemma3", "phi3-mini", "qwen3-moe"])
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    kernels = CudaKernels(torch.float32, False, torch.device("cpu"))
    reference = save(name, tmp_path)
    models = load_model(
        tmp_path, read_config(tmp_path), torch.float32, "auto", 1, kernels, lambda _: None
    )
    asked = prompts((21, 1, 9))
    found = PagedRun(models, kernels, torch.float32, asked).logits()
    for logits, tokens in zip(found, asked, strict=True):
        torch.testing.assert_close(logits, expected_logits(reference, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("tp", [1, 2])
def test_logits_by_a_cache_of_12_bits(tp: int, tmp_path: Path) -> None:
    """As those by bfloat16's own, of which it keeps all but what is small beside others."""
    write_model("tiny", tmp_path)
    config, device = replace(read_config(tmp_path), head_dim=64), torch.device("cpu")
    wide, narrow = (
        dummy_logits(
            config, CudaKernels(torch.bfloat16, False, device, e4m7_cache=e4m7), tp,
            prompts((21, 1, 9)),
        )
        for e4m7 in (False, True)
    )  # fmt: skip
    error = (narrow - wide).norm() / wide.norm()
    assert error < 0.02
