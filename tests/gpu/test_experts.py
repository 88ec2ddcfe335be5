"""A mixture of experts on a GPU: real shapes, and graphs that serve whatever the router picks."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytestmark = pytest.mark.gpu
if importlib.util.find_spec("triton") is None or not torch.cuda.is_available():
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

from albireo.workers.kernels import create  # noqa: E402

from ..workers.mixture_check import MixtureCheck  # noqa: E402

DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalise", [True, False])
def test_rows_of_any_number(dtype: torch.dtype, normalise: bool) -> None:
    check = MixtureCheck(create("cuda", dtype, False), 128, 8, 512, 192, seed=1)
    for rows in (1, 7, 64, 100):
        check.run(rows, normalise)


def test_a_captured_step_serves_any_choice() -> None:
    kernels = create("cuda", torch.bfloat16, False)
    check = MixtureCheck(kernels, 16, 4, 256, 128, seed=2)
    x, scores = check.x.to("cuda"), check.scores.to("cuda")
    kernels.experts(x, scores, *check.packed, 4, True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.experts(x, scores, *check.packed, 4, True)
    for spread in (0.1, 3.0, 100.0):  # from even use of all experts to a few
        x.normal_()
        scores.normal_(0, spread)
        scores[:, 3] += spread
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, kernels.experts(x, scores, *check.packed, 4, True))
