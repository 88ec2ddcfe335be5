"""/v1/completions: the four forms of a prompt, echo, log-probabilities, streams, usage."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from albireo.client import (
    Delta,
    End,
    GroupFailed,
    InternalError,
    InvalidRequest,
    QueueFull,
    TooLong,
)
from albireo.gateway.link import Ask

from .played import MODEL, PlayedLink, chunks, failing, post, row

PATH = "/v1/completions"


def ask(body: dict[str, Any], link: PlayedLink | None = None) -> dict[str, Any]:
    response = post(PATH, body, link)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_an_answer_has_every_field() -> None:
    answer = ask({"model": MODEL, "prompt": "hi", "max_tokens": 2})
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "object": "text_completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "text": " hi0 hi1",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                "prompt_logprobs": None,
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a", [" a0"]),
        (["a", "b"], [" a0", " b0"]),
        ([97, 98], [" ab0"]),
        ([[97], [98, 99]], [" a0", " bc0"]),
    ],
)
def test_the_four_forms_of_a_prompt(prompt: Any, texts: list[str]) -> None:
    answer = ask({"prompt": prompt, "max_tokens": 1})
    assert [each["text"] for each in answer["choices"]] == texts
    assert [each["index"] for each in answer["choices"]] == list(range(len(texts)))


def test_the_index_of_a_choice_is_prompt_times_n_plus_i() -> None:
    answer = ask({"prompt": ["a", "b"], "n": 2, "max_tokens": 1})
    assert [each["text"] for each in answer["choices"]] == [" a0", " A0", " b0", " B0"]
    # A prompt counts once, its answers each.
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 4, "total_tokens": 10}


@pytest.mark.parametrize("prompt", [[], ["a", 1], [[1], "a"], [["a"]], {"a": 1}, 5, None, [True]])
def test_a_prompt_of_another_form_is_refused(prompt: Any) -> None:
    response = post(PATH, {"prompt": prompt})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("prompt")


def test_too_many_answers_are_refused() -> None:
    response = post(PATH, {"prompt": ["a"] * 1000, "n": 128})
    assert response.status_code == 400
    assert "128000" in response.json()["error"]["message"]


@pytest.mark.parametrize("prompt", ["hi", [104, 105]])
def test_echo(prompt: Any) -> None:
    assert ask({"prompt": prompt, "echo": True, "max_tokens": 1})["choices"][0]["text"] == "hi hi0"


def test_logprobs() -> None:
    choice = ask({"prompt": "p", "logprobs": 2, "max_tokens": 2})["choices"][0]
    assert choice["logprobs"] == {
        "tokens": [" p0", " p1"],
        "token_logprobs": [-0.5, -0.5],
        "text_offset": [0, 3],
        "top_logprobs": [{"a": -0.1, "b": -0.2, " p0": -0.5}, {"a": -0.1, "b": -0.2, " p1": -0.5}],
    }


def test_logprobs_of_0_are_those_of_the_tokens_alone() -> None:
    choice = ask({"prompt": "p", "logprobs": 0, "max_tokens": 1})["choices"][0]
    assert choice["logprobs"]["top_logprobs"] == [{" p0": -0.5}]


def test_echo_with_logprobs_gives_those_of_the_prompt_and_of_its_first_token_none() -> None:
    link = PlayedLink()
    choices = ask({"prompt": "p", "echo": True, "logprobs": 1, "max_tokens": 1, "n": 2}, link)[
        "choices"
    ]
    assert [each["text"] for each in choices] == ["p p0", "p P0"]
    found = choices[0]["logprobs"]
    assert found["tokens"] == ["^", "x", "z", " p0"]
    assert found["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert found["text_offset"] == [0, 0, 1, 1]  # "^" is not in the text
    assert found["top_logprobs"][:3] == [None, {"y": -0.1, "x": -0.5}, {"z": -0.5}]
    assert choices[1]["logprobs"]["tokens"] == ["^", "x", "z", " P0"]
    assert link.asks[0].params.prompt_logprobs == 1


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_max_tokens_0_scores_the_prompt_alone(stream: bool) -> None:
    body = {"prompt": "p", "echo": True, "logprobs": 0, "max_tokens": 0, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
        got = chunks(post(PATH, body))
        assert "".join(c["text"] for each in got for c in each["choices"]) == "p"
        tokens = got[0]["choices"][0]["logprobs"]["tokens"]
        usage = got[-1]["usage"]
    else:
        answer = ask(body)
        assert answer["choices"][0]["text"] == "p"
        tokens, usage = answer["choices"][0]["logprobs"]["tokens"], answer["usage"]
    assert tokens == ["^", "x", "z"]
    assert usage == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}


async def _scored_in_parts(
    link: PlayedLink, number: int, ask: Ask, on_reply: Callable[[Any], None]
) -> None:
    """Prompts whose log-probabilities come over three Deltas, the later the later prompts."""
    assert ask.params.prompt_logprobs is not None
    for part in ("abc", "def", "gh"):
        on_reply(Delta(number, 0, [], "", None, 0, None, [row(each) for each in part]))
        await asyncio.sleep(0.002 * (number + 1))
    for choice in range(ask.params.n):
        for place in range(most := ask.params.max_tokens or 2):
            word = f" {place}"
            end = End("length", None, 9, most) if place == most - 1 else None
            on_reply(Delta(number, place, [1], word, end, choice, [row(word)]))
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("body", [{"prompt": "p"}, {"prompt": ["p", "q"], "n": 2}])
@pytest.mark.parametrize("most", [2, 0])
def test_a_stream_has_all_logprobs_of_a_prompt_that_come_in_parts(
    body: dict[str, Any], most: int
) -> None:
    body = body | {"echo": True, "logprobs": 0, "max_tokens": most}
    whole = ask(body, PlayedLink(_scored_in_parts))["choices"]
    got = chunks(post(PATH, body | {"stream": True}, PlayedLink(_scored_in_parts)))
    for choice in whole:
        assert len(choice["logprobs"]["tokens"]) == 9 + most
        own = [c for g in got for c in g["choices"] if c["index"] == choice["index"]]
        for field in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            joined = [v for each in own if each["logprobs"] for v in each["logprobs"][field]]
            assert joined == choice["logprobs"][field]


def test_prompt_logprobs_in_vllms_form() -> None:
    choice = ask({"prompt": "p", "prompt_logprobs": 1, "max_tokens": 1})["choices"][0]
    assert choice["logprobs"] is None
    assert choice["prompt_logprobs"] == [
        None,
        {
            str(ord("x")): {"logprob": -0.5, "rank": 1, "decoded_token": "x"},
            str(ord("y")): {"logprob": -0.1, "rank": 1, "decoded_token": "y"},
        },
        {str(ord("z")): {"logprob": -0.5, "rank": 1, "decoded_token": "z"}},
    ]


@pytest.mark.parametrize(
    "extra", [{}, {"echo": True}, {"logprobs": 1}, {"logprobs": 1, "echo": True}]
)
def test_a_stream_adds_up_to_the_whole_answer(extra: dict[str, Any]) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 3, **extra}
    whole = ask(body)["choices"]
    got = chunks(post(PATH, body | {"stream": True, "stream_options": {"include_usage": True}}))
    assert got[-1]["choices"] == []
    assert got[-1]["usage"]["completion_tokens"] == 12
    assert all(each["usage"] is None for each in got[:-1])
    for choice in whole:
        own = [c for g in got for c in g["choices"] if c["index"] == choice["index"]]
        assert "".join(each["text"] for each in own) == choice["text"]
        assert [each["finish_reason"] for each in own if each["finish_reason"]] == ["length"]
        assert own[-1]["finish_reason"] == "length"
        if "logprobs" in extra:
            for field in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
                joined = [v for each in own if each["logprobs"] for v in each["logprobs"][field]]
                assert joined == choice["logprobs"][field]


def test_chunks_of_a_stream_have_one_id_and_no_usage_unless_asked() -> None:
    got = chunks(post(PATH, {"prompt": "a", "stream": True}))
    assert len({(each["id"], each["created"]) for each in got}) == 1
    assert all("usage" not in each for each in got)


def test_special_tokens_can_be_left_out() -> None:
    link = PlayedLink()
    ask({"prompt": "hi", "add_special_tokens": False}, link)
    assert link.asks[0].prompt == [104, 105]


def test_an_error_before_the_first_token_is_a_status() -> None:
    for stream in (False, True):
        body = {"prompt": "a", "stream": stream}
        response = post(PATH, body, PlayedLink(failing(QueueFull("full", retry=True))))
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        response = post(PATH, body, PlayedLink(failing(TooLong("too long", param="prompt_ids"))))
        assert response.status_code == 400
        assert response.json()["error"] == {
            "message": "too long",
            "type": "invalid_request_error",
            "param": "prompt",
            "code": "context_length_exceeded",
        }


def test_clients_are_told_not_to_send_again_what_has_ended_groups() -> None:
    for error, status in (
        (GroupFailed("it died", retry=True), 503),
        (GroupFailed("the only suspect", retry=False), 500),
        (InternalError("a fault"), 500),
    ):
        response = post(PATH, {"prompt": "a"}, PlayedLink(failing(error)))
        assert response.status_code == status
        again = status == 503
        assert ("retry-after" in response.headers) == again
        assert response.headers.get("x-should-retry") == (None if again else "false")


def test_an_error_in_mid_stream_is_an_event_and_the_stream_ends() -> None:
    script = failing(GroupFailed("the group died", retry=True), after=2)
    got = chunks(post(PATH, {"prompt": "a", "stream": True}, PlayedLink(script)))
    assert "".join(c["text"] for each in got[:-1] for c in each["choices"]) == "xx"
    assert got[-1]["error"]["message"] == "the group died"


def test_one_prompt_of_several_that_fails_ends_them_all() -> None:
    link = PlayedLink()

    async def script(played: PlayedLink, number: int, ask: Any, on_reply: Any) -> None:
        if number == 1:
            on_reply(TooLong("too long"))
        else:
            await asyncio.sleep(60)

    link._script = script
    assert post(PATH, {"prompt": ["a", "b", "c"]}, link).status_code == 400
    assert link.abandoned == [0, 2]


def test_of_a_prompt_of_one_token_nothing_is_known() -> None:
    async def one_token(
        link: PlayedLink, number: int, ask: Ask, on_reply: Callable[[Any], None]
    ) -> None:
        on_reply(Delta(number, 0, [1], "x", End("length", None, 1, 1)))

    body = {"prompt": "a", "max_tokens": 1, "prompt_logprobs": 0}
    answer = post("/v1/completions", body, PlayedLink(one_token)).json()
    assert answer["choices"][0]["prompt_logprobs"] == [None]
    body = {"messages": [{"role": "user", "content": "a"}], "prompt_logprobs": 0}
    answer = post("/v1/chat/completions", body, PlayedLink(one_token)).json()
    assert answer["prompt_logprobs"] == [None]


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"guided_choice": ["a", "b"]}, "guided_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a+"}}, "structured_outputs"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_is_refused_has_the_name_that_it_was_given(
    extra: dict[str, Any], param: str, stream: bool
) -> None:
    link = PlayedLink(failing(InvalidRequest("too deep", param="grammar")))
    answer = post("/v1/completions", {"prompt": "a", "stream": stream} | extra, link)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_usage_so_far_counts_what_is_shown_of_an_echoed_prompt() -> None:
    options = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    body = {"prompt": ["ab", "c"], "echo": True, "logprobs": 0} | options
    got = chunks(post(PATH, body | {"max_tokens": 2}))
    for index in (0, 1):
        own = [each["usage"] for each in got if each["choices"][0]["index"] == index]
        assert [each["completion_tokens"] for each in own] == [0, 1, 2]
        assert {each["prompt_tokens"] for each in own} == {3}
    got = chunks(post(PATH, body | {"max_tokens": 0}))
    assert {(c["usage"]["prompt_tokens"], c["usage"]["completion_tokens"]) for c in got} == {(3, 0)}
