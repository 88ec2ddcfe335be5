"""Structured output on a node with a GPU: schemas hold, beside rows that have none."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from albireo.client import Client, Completion, Grammar  # noqa: E402

from ..node.test_grammar import SCHEMA, check  # noqa: E402


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_schemas_hold(
    start_node: Callable[..., str], tiny_model_dir: Path, cuda_graphs: bool
) -> None:
    node = start_node(
        name="g", model=str(tiny_model_dir), load_format="dummy", device="cuda",
        cuda_graphs=cuda_graphs,
    )  # fmt: skip
    schema = Grammar(json_schema=SCHEMA)
    with Client.connect(node=node) as client, ThreadPoolExecutor(32) as pool:

        def ask(seed: int) -> Completion:
            grammar = schema if seed % 2 else None
            return client.generate("x", grammar=grammar, max_tokens=200, seed=seed, logprobs=1)

        answers = list(pool.map(ask, range(64)))
    for seed, answer in enumerate(answers):
        if seed % 2:
            check(answer.text)
            assert answer.finish_reason == "stop"
        assert answer.logprobs is not None
        assert len(answer.logprobs) == len(answer.token_ids)
    assert len({json.dumps(answer.token_ids) for answer in answers}) > 60
