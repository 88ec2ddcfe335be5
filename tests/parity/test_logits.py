"""The demo model's logits equal those of transformers reading the same GGUF file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from albireo.workers.kernels import create
from albireo.workers.models.load import load_model, read_config

from ..workers.paged_run import PagedRun
from ..workers.tiny_models import expected_logits

pytestmark = pytest.mark.demo

_TOLERANCE = 1e-3
_LENGTHS = (3, 40, 130)


@pytest.mark.timeout(300)
def test_logits_equal_transformers(demo_model_path: Path, reference: PreTrainedModel) -> None:
    config = read_config(demo_model_path)
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(config.vocab_size, (n,), generator=generator).tolist() for n in _LENGTHS
    ]
    expected = [expected_logits(reference, tokens) for tokens in prompts]
    kernels = create("cpu", torch.float32, batch_invariant=False)
    for tp in (1, 3):
        models = load_model(
            demo_model_path, config, torch.float32, "auto", tp, kernels, lambda _: None
        )
        found = PagedRun(models, kernels, torch.float32, prompts, seed=tp).logits()
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=_TOLERANCE)
