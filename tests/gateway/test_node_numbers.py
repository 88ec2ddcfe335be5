"""Logit bias and allowed tokens from a real model (random weights, on the CPU)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from albireo.node.launch import stop_node

from .conftest import MODEL, start_http_node

pytestmark = pytest.mark.node


@pytest.fixture(scope="module")
def client(http_home: Path, tiny_model_dir: Path) -> Iterator[openai.OpenAI]:
    node = start_http_node(
        http_home, name="numbers", device="cpu", dtype="float32", load_format="dummy", threads=1,
        model=str(tiny_model_dir), served_model_name=MODEL, batch_invariant=True,
    )  # fmt: skip
    with openai.OpenAI(
        base_url=f"{node.http}/v1", api_key="none", max_retries=0, http_client=httpx2.Client()
    ) as client:
        yield client
    stop_node(node.name, now=True, timeout_s=20)


def test_logit_bias_has_string_keys(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="a", max_tokens=4, temperature=0, logit_bias={"65": 100},
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    only = client.completions.create(
        model=MODEL, prompt="a", max_tokens=4, extra_body={"allowed_token_ids": [65]}
    )
    assert answer.choices[0].text == only.choices[0].text
