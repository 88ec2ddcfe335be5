"""Numbers as they are served: bfloat16 and 12 bits, layers of an 8B model's size, all GEMMs.

The kernels for large layers do not run in the tiny models of the other tests.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

pytestmark = pytest.mark.gpu
if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)
if torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs an H100 or H200", allow_module_level=True)

from albireo.workers.kernels import create  # noqa: E402
from albireo.workers.models.load import load_model, read_config  # noqa: E402

from ..workers.paged_run import PagedRun  # noqa: E402
from ..workers.tiny_models import draw_weights  # noqa: E402

_VOCAB = 32_768
_MANY = [[(17 * i + 31 * j) % _VOCAB for j in range(10)] for i in range(256)]
"""Some 128 that decode, and up to 2,000 rows beside chunks."""
_LONG = [[(7 * j * j + 3) % _VOCAB for j in range(100)]]
"""One that goes alone, in steps of one to nine rows."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, PreTrainedModel]]:
    """Two layers as Qwen3-8B's, random, in bfloat16: where it is saved, and itself on the GPU."""
    config = Qwen3Config(
        vocab_size=_VOCAB, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=2,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        max_position_embeddings=1024, rms_norm_eps=1e-6,
    )  # fmt: skip
    torch.manual_seed(5)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="eager"
        ).eval()
    draw_weights(model, 0.02)
    directory = tmp_path_factory.mktemp("wide")
    model.save_pretrained(directory)
    yield directory, model
    del model
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def errors(
    wide: tuple[Path, PreTrainedModel],
) -> Iterator[tuple[Callable[[list[torch.Tensor]], float], float]]:
    """(error(logits of both runs), the error of transformers in bfloat16), of float32's norm."""
    model = wide[1]

    def logits(of: PreTrainedModel) -> torch.Tensor:
        with torch.inference_mode():
            runs = [of(torch.tensor(prompts, device="cuda")).logits for prompts in (_LONG, _MANY)]
            return torch.cat([run.float().view(-1, _VOCAB).cpu() for run in runs])

    exact = logits(copy.deepcopy(model).float())

    def error(found: list[torch.Tensor]) -> float:
        return float((torch.cat(found) - exact).norm() / exact.norm())

    yield error, error([logits(model)])
    torch.cuda.empty_cache()


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("weights", ["off", "beside", "only"])
def test_no_worse_than_transformers_in_bfloat16(
    weights: str,
    tp: int,
    wide: tuple[Path, PreTrainedModel],
    errors: tuple[Callable[[list[torch.Tensor]], float], float],
) -> None:
    """Against transformers in float32 with the same weights; 12 bits lose nothing to see."""
    error, of_bfloat16 = errors
    cache = "model" if weights == "off" else "e4m7"
    kernels = create("cuda", torch.bfloat16, False, weights, cache)
    config = read_config(wide[0])
    models = load_model(wide[0], config, torch.bfloat16, "auto", tp, kernels, lambda _: None)
    found = [
        logits
        for prompts in (_LONG, _MANY)
        for logits in PagedRun(models, kernels, torch.bfloat16, prompts, seed=tp).logits()
    ]
    ours = error(found)
    print(f"{weights}, {tp} ranks: {ours:.5f}, transformers {of_bfloat16:.5f}")
    assert 0 < ours < 1.1 * of_bfloat16 < 0.05
