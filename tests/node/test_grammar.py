"""Structured output on a real node: a model of random weights writes what its grammar allows."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from albireo.client import Client, Grammar, InvalidRequest

from .processes import status
from .test_failover import tell, tell_through_a_death

pytestmark = pytest.mark.node

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
LETTERS = re.compile("[a-f]{1,200}x")


def check(text: str) -> None:
    found = json.loads(text)
    assert list(found) == ["name", "age", "tags"]
    assert len(found["name"]) <= 12
    assert 0 <= found["age"] <= 999
    assert set(found["tags"]) <= {"red", "green"} and len(found["tags"]) <= 3


@pytest.fixture(scope="module", params=[(1,), (3,)], ids=["1x1", "1x3"])
def client(
    request: pytest.FixtureRequest, start_shared_node: Callable[..., str], tiny_model_dir: Path
) -> Iterator[Client]:
    node = start_shared_node(
        name=f"g{sum(request.param)}", model=str(tiny_model_dir), load_format="dummy", device="cpu",
        groups=request.param, dtype="float32", threads=1,
    )  # fmt: skip
    with Client.connect(node=node) as client:
        yield client


def test_every_kind_and_what_goes_with_it(client: Client) -> None:
    schema = Grammar(json_schema=SCHEMA)
    answers = client.generate("x", grammar=schema, n=8, max_tokens=200, seed=1, logprobs=2)
    assert len({each.text for each in answers.choices}) > 4
    for each in answers.choices:
        check(each.text)
        assert each.finish_reason == "stop"
        assert each.logprobs is not None and len(each.logprobs) == len(each.token_ids)
    again = client.generate("x", grammar=schema, n=8, max_tokens=200, seed=1)
    assert [each.text for each in again.choices] == [each.text for each in answers.choices]
    chat = client.chat([{"role": "user", "content": "Hi"}], grammar=schema, max_tokens=200)
    check(chat.text)

    def text(grammar: Grammar, **params: Any) -> str:
        return client.generate([5, 6, 7], grammar=grammar, max_tokens=250, **params).text

    assert text(Grammar(choice=("yes é", "no"))) in ("yes é", "no")
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", text(Grammar(regex="[0-9]{3}-[a-f]{2}")))
    assert text(Grammar(lark='start: "a" "b"')) == "ab"
    assert text(Grammar(regex="[ab]{30}"), stop=["bb"]).find("bb") == -1
    penalised = text(Grammar(regex="[a-j]{10}"), frequency_penalty=2.0, temperature=0.01)
    assert re.fullmatch("[a-j]{10}", penalised)
    # The grammar may end anywhere; min_tokens says not before.
    assert len(text(Grammar(regex="[a-z]*"), min_tokens=20)) >= 20
    # It can only end: that goes before min_tokens and ignore_eos.
    assert text(Grammar(regex="abc"), min_tokens=20) == "abc"
    assert text(Grammar(regex="abc"), ignore_eos=True) == "abc"
    biased = text(Grammar(regex="[ab]{9}"), logit_bias={client.tokenize("b")[-1]: 100.0})
    assert biased == "b" * 9


def test_what_cannot_be_is_refused_and_others_go_on(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="unclosed group") as caught:
        client.generate("x", grammar=Grammar(regex="("))
    assert caught.value.param == "grammar"
    with pytest.raises(InvalidRequest, match="exactly one"):
        client.generate("x", grammar=Grammar())
    with pytest.raises(InvalidRequest, match="no token is left"):
        client.generate("x", grammar=Grammar(regex="a"), allowed_token_ids=[9])
    assert client.generate("x", grammar=Grammar(regex="abc")).text == "abc"


def test_beside_rows_without_a_grammar(client: Client) -> None:
    free = client.generate("x", max_tokens=60, seed=4, ignore_eos=True).token_ids
    wrong: list[str] = []

    def ask(seed: int) -> None:
        answer = client.generate(
            "x", grammar=Grammar(json_schema=SCHEMA), max_tokens=200, seed=seed
        )
        try:
            check(answer.text)
        except (AssertionError, ValueError):
            wrong.append(answer.text)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    beside = client.generate("x", max_tokens=60, seed=4, ignore_eos=True).token_ids
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert len(beside) == len(free) == 60


@pytest.mark.parametrize("swap_gib", [0.0, 0.01])
def test_a_preempted_answer_goes_on(
    start_node: Callable[..., str], tiny_model_dir: Path, swap_gib: float
) -> None:
    block_bytes = 16 * 2 * 3 * 16 * 2 * 4
    node = start_node(
        name="p", model=str(tiny_model_dir), load_format="dummy", device="cpu", dtype="float32",
        threads=1, max_num_seqs=8, max_model_len=256, kv_cache_gib=24 * block_bytes / 2**30,
        swap_space_gib=swap_gib,
    )  # fmt: skip
    grammar = Grammar(regex="[a-f]{150}x")
    with Client.connect(node=node) as client:
        answers = client.generate("hello", grammar=grammar, n=8, max_tokens=200, seed=3)
        alone = [
            client.generate("hello", grammar=grammar, max_tokens=200, seed=3 + i).text
            for i in range(8)
        ]
    for each in answers.choices:
        assert re.fullmatch("[a-f]{150}x", each.text), each.text
    assert [each.text for each in answers.choices] == alone
    assert status(node)["groups"][0]["scheduler"]["preemptions"] > 0


def test_a_stream_that_goes_on_elsewhere_keeps_its_grammar(
    start_node: Callable[..., str], tiny_model_dir: Path
) -> None:
    node = start_node(
        name="m", model=str(tiny_model_dir), load_format="dummy", device="cpu", groups=(1, 1),
        dtype="float32", threads=1, batch_invariant=True,
    )  # fmt: skip
    params = {"max_tokens": 480, "grammar": Grammar(regex="([a-f]{20}-){22}x")}
    undisturbed = tell(node, params)
    story = tell_through_a_death(node, params, "g0.worker0")
    assert story.texts == undisturbed.texts
    assert all(re.fullmatch("([a-f]{20}-){22}x", each) for each in story.texts)


def test_the_sim_device_says_that_it_has_no_grammar(
    start_node: Callable[..., str], tiny_model_dir: Path
) -> None:
    node = start_node(name="s", model=str(tiny_model_dir), load_format="dummy", device="sim")
    with (
        Client.connect(node=node) as client,
        pytest.raises(InvalidRequest, match="structured output needs a model"),
    ):
        client.generate("x", grammar=Grammar(json_object=True))
