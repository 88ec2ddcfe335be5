"""n, log-probabilities, bias and bad words from a real model (random weights, on the CPU)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from albireo.node.launch import stop_node

from .conftest import MODEL, start_http_node

pytestmark = pytest.mark.node

HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def client(module_home: Path, tiny_model_dir: Path) -> Iterator[openai.OpenAI]:
    node = start_http_node(
        module_home, name="numbers", device="cpu", dtype="float32", load_format="dummy", threads=1,
        model=str(tiny_model_dir), served_model_name=MODEL, batch_invariant=True,
    )  # fmt: skip
    with openai.OpenAI(
        base_url=f"{node.http}/v1", api_key="none", max_retries=0, http_client=httpx2.Client()
    ) as client:
        yield client
    stop_node(node.name, now=True, timeout_s=20)


def test_the_seed_of_the_i_th_answer_is_seed_plus_i(client: openai.OpenAI) -> None:
    asks: Any = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 1.0}
    three = client.completions.create(n=3, seed=40, **asks)
    assert [each.index for each in three.choices] == [0, 1, 2]
    for i, choice in enumerate(three.choices):
        alone = client.completions.create(seed=40 + i, **asks)
        assert alone.choices[0].text == choice.text
    assert three.usage is not None
    assert three.usage.prompt_tokens == 3


def test_streams_of_several_answers_add_up(client: openai.OpenAI) -> None:
    asks: Any = {"model": MODEL, "messages": HELLO, "n": 3, "seed": 1, "max_tokens": 8}
    whole = client.chat.completions.create(**asks)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(stream=True, **asks):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [each.message.content for each in whole.choices]


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, logprobs=True, top_logprobs=3, temperature=0, max_tokens=6
    )
    found = answer.choices[0].logprobs
    assert found is not None and found.content is not None
    assert answer.usage is not None
    assert len(found.content) == answer.usage.completion_tokens
    for each in found.content:
        best = [top.logprob for top in each.top_logprobs]
        assert len(best) == 3 and best == sorted(best, reverse=True)
        assert each.logprob == pytest.approx(best[0])
        assert each.logprob < 0


def test_echo_with_logprobs_scores_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="Once upon", echo=True, logprobs=2, max_tokens=3, temperature=0
    )
    choice = answer.choices[0]
    found = choice.logprobs
    assert found is not None and found.tokens is not None and found.token_logprobs is not None
    assert "".join(found.tokens[:9]) == "Once upon"
    assert found.token_logprobs[0] is None
    assert all(each is not None and each < 0 for each in found.token_logprobs[1:])
    # The same scores, asked for without an answer.
    scores = client.completions.create(
        model=MODEL, prompt="Once upon", echo=True, logprobs=2, max_tokens=0
    )
    assert scores.choices[0].text == "Once upon"
    assert scores.choices[0].logprobs is not None
    assert scores.choices[0].logprobs.token_logprobs == found.token_logprobs[:9]


def test_a_stream_scores_all_of_a_long_prompt(client: openai.OpenAI) -> None:
    """More than one plan has room for: its scores come over several Deltas."""
    asks: Any = {"model": MODEL, "prompt": list(range(5, 105)) * 4, "echo": True, "logprobs": 0}
    found: dict[str, list[Any]] = {"token_logprobs": [], "text_offset": []}
    for chunk in client.completions.create(stream=True, max_tokens=2, temperature=0, **asks):
        for name, values in found.items():
            values += getattr(chunk.choices[0].logprobs, name, None) or []
    whole = client.completions.create(max_tokens=2, temperature=0, **asks).choices[0].logprobs
    assert whole is not None and len(found["token_logprobs"]) == 402
    assert found["token_logprobs"] == whole.token_logprobs
    assert found["text_offset"] == whole.text_offset


def test_logit_bias_has_string_keys(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="a", max_tokens=4, temperature=0, logit_bias={"65": 100},
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    only = client.completions.create(
        model=MODEL, prompt="a", max_tokens=4, extra_body={"allowed_token_ids": [65]}
    )
    assert answer.choices[0].text == only.choices[0].text


def test_prompt_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=1, extra_body={"prompt_logprobs": 1}
    )
    rows = answer.model_extra["prompt_logprobs"] if answer.model_extra else None
    assert answer.usage is not None
    assert rows[0] is None and len(rows) == answer.usage.prompt_tokens
    assert all(next(iter(each.values()))["logprob"] < 0 for each in rows[1:])


def test_bad_words_are_not_said(client: openai.OpenAI) -> None:
    asks: Any = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 12, "temperature": 0}
    text = client.completions.create(**asks, extra_body={"ignore_eos": True}).choices[0].text
    word = next(each for each in text if each.isascii() and each.isalpha())
    other = client.completions.create(**asks, extra_body={"ignore_eos": True, "bad_words": [word]})
    assert word not in other.choices[0].text != text


def test_without_asynchronous_output_the_tokens_are_the_same(
    client: openai.OpenAI, module_home: Path, tiny_model_dir: Path
) -> None:
    asks: Any = {"model": MODEL, "prompt": [[5, 6], [7, 8, 9]], "seed": 3, "max_tokens": 10}
    node = start_http_node(
        module_home, name="output", device="cpu", dtype="float32", load_format="dummy", threads=1,
        model=str(tiny_model_dir), served_model_name=MODEL, batch_invariant=True,
        async_output=False,
    )  # fmt: skip
    try:
        with openai.OpenAI(base_url=f"{node.http}/v1", api_key="none", max_retries=0) as slower:
            found = [each.text for each in slower.completions.create(**asks).choices]
    finally:
        stop_node(node.name, now=True, timeout_s=20)
    assert found == [each.text for each in client.completions.create(**asks).choices]
