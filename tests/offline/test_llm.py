"""LLM: batches on a real node of a tiny model, whose answers do not depend on the batch."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from albireo import LLM, SamplingParams
from albireo.client import Client, Completion, InvalidRequest, NodeNotRunning, TooLong
from albireo.ipc.simulated import sim_token
from albireo.node.options import OptionError

from ..node.processes import pids, wait_for

pytestmark = pytest.mark.node

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(module_home: Path, tiny_model_dir: Path) -> Iterator[LLM]:
    with LLM(
        tiny_model_dir, groups="2x1", device="cpu", dtype="float32", load_format="dummy",
        max_num_seqs=4, max_num_queued_reqs=2, batch_invariant=True,
    ) as llm:  # fmt: skip
        yield llm


@pytest.fixture(scope="module")
def slow(module_home: Path, tiny_model_dir: Path) -> Iterator[LLM]:
    """Steps of 5 ms, tokens by a formula."""
    with LLM(
        tiny_model_dir, groups=(1, 1), device="sim", sim_step_ms=5.0, max_num_seqs=4,
        max_num_queued_reqs=4,
    ) as llm:  # fmt: skip
        yield llm


def alone(llm: LLM, prompt: str | list[int]) -> list[int]:
    with Client.connect(node=llm.name) as client:
        return client.generate(prompt, GREEDY).token_ids


def test_answers_stand_where_their_prompts_do(llm: LLM) -> None:
    """Four times what the node takes at once, of many lengths, texts and ids."""
    prompts: list[str | list[int]] = [
        [i, i + 1, i + 2] if i % 3 else "abcdefgh"[: i % 8 + 1] for i in range(48)
    ]
    params = [msgspec.structs.replace(GREEDY, max_tokens=1 + i % 6) for i in range(48)]
    answers = llm.generate(prompts, params)
    for prompt, its, answer in zip(prompts, params, answers, strict=True):
        assert isinstance(answer, Completion)
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.finish_reason == "length"
        assert answer.token_ids == alone(llm, prompt)[: its.max_tokens]


def test_forms_of_prompts(llm: LLM) -> None:
    text, ids = alone(llm, "ab"), alone(llm, [1, 2, 3])
    assert [each.token_ids for each in llm.generate("ab", GREEDY)] == [text]
    assert [each.token_ids for each in llm.generate([1, 2, 3], GREEDY)] == [ids]
    assert [each.token_ids for each in llm.generate([[1, 2, 3], "ab"], GREEDY)] == [ids, text]
    arrays = [np.array([1, 2, 3]), np.array([1])]
    assert llm.generate(arrays, GREEDY)[0].token_ids == ids
    assert [each.token_ids for each in llm.generate(arrays[0], GREEDY)] == [ids]
    assert llm.generate([]) == []
    assert len(llm.generate("ab", GREEDY, max_tokens=2)[0].token_ids) == 2


def test_conversations(llm: LLM) -> None:
    hello = [{"role": "user", "content": "Hello"}]
    bye = [*hello, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Bye"}]
    with Client.connect(node=llm.name) as client:
        expected = [client.chat(each, GREEDY).text for each in (hello, bye)]
    assert [each.text for each in llm.chat([hello, bye], GREEDY)] == expected
    assert [each.text for each in llm.chat(hello, GREEDY)] == expected[:1]


def test_choices_and_logprobs(llm: LLM) -> None:
    many = SamplingParams(n=3, max_tokens=4, seed=1, logprobs=2, ignore_eos=True)
    for answer in llm.generate([[1, 2, 3]] * 9, many):
        assert len({tuple(choice.token_ids) for choice in answer.choices}) > 1
        for choice in answer.choices:
            assert choice.logprobs is not None
            assert [each.token.token_id for each in choice.logprobs] == choice.token_ids
            assert all(len(each.top) == 2 for each in choice.logprobs)


def test_one_bad_prompt(llm: LLM) -> None:
    prompts = [[1, 2]] * 20
    prompts[13] = [1] * 600
    with pytest.raises(TooLong) as caught:
        llm.generate(prompts, GREEDY)
    assert caught.value.__notes__ == ["This is about prompt 13, of 0 to 19."]
    wait_for("the rest is cancelled", lambda: in_flight(llm) == 0, 2)
    answers = llm.generate(prompts, GREEDY, return_errors=True)
    assert [i for i, each in enumerate(answers) if isinstance(each, TooLong)] == [13]
    assert sum(isinstance(each, Completion) for each in answers) == 19


def in_flight(llm: LLM) -> int:
    return int(llm.client.status()["requests"]["in_flight"])


def test_what_is_wrong_is_said(llm: LLM, tiny_model_dir: Path) -> None:
    with pytest.raises(ValueError, match="2 parameters for 3 prompts"):
        llm.generate(["a", "b", "c"], [GREEDY, GREEDY])
    with pytest.raises(InvalidRequest, match="temperature"):
        llm.generate("a", temperature=-1.0)
    with pytest.raises(TypeError, match="'max_num_seq'; did you mean 'max_num_seqs'"):
        LLM(tiny_model_dir, max_num_seq=3)
    with pytest.raises(OptionError, match=r"\$.max_num_seqs"):
        LLM(tiny_model_dir, max_num_seqs=0)
    with pytest.raises(OptionError, match=r"<= 1000000000.0 - at `\$.step_timeout_s`"):
        LLM(tiny_model_dir, step_timeout_s=float("inf"))
    with pytest.raises(OptionError, match=r"auto\|cpu\|cuda\|sim"):
        LLM(tiny_model_dir, device="tpu")
    with pytest.raises(OptionError, match="GROUPSxTP"):
        LLM(tiny_model_dir, groups="two")
    with pytest.raises(OptionError, match=r"length >= 1 - at `\$.groups`"):
        LLM(tiny_model_dir, groups=())
    with pytest.raises(TypeError, match=r"groups=2: give GROUPSxTP such as '2x4'"):
        LLM(tiny_model_dir, groups=2)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"`\$.seed`"):
        LLM(tiny_model_dir, seed=10**24)
    with pytest.raises(RuntimeError, match="no such file or directory"):
        LLM("/no/such/model")


@pytest.mark.parametrize("params", [{"max_tokens": 3}, [{"max_tokens": 3}]])
def test_parameters_of_another_type_are_said(llm: LLM, params: Any) -> None:
    with pytest.raises(TypeError, match=r"a SamplingParams, not a dict; .* max_tokens=3"):
        llm.generate("x", params)
    with pytest.raises(TypeError, match=r"a SamplingParams, not a (dict|list); .* max_tokens=3"):
        llm.client.generate("x", params)


@pytest.mark.parametrize("prompts", [{"prompt": "x"}, [{"prompt_token_ids": [1]}]])
def test_a_prompt_in_a_dict_is_said_to_be_none(llm: LLM, prompts: Any) -> None:
    with pytest.raises(TypeError, match="without a dict around it"):
        llm.generate(prompts, GREEDY)


def test_a_runtime_directory_that_is_too_long(
    module_home: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALBIREO_RUNTIME_DIR", f"/tmp/{'long' * 30}")
    with pytest.raises(ValueError, match="set ALBIREO_RUNTIME_DIR to a shorter"):
        LLM(tiny_model_dir, device="sim")


def test_beside_another_client(slow: LLM) -> None:
    """The node has less room than the LLM thinks; what is refused goes again."""
    with Client.connect(node=slow.name) as client:
        others = [client.stream([1], max_tokens=100, ignore_eos=True) for _ in range(15)]
        answers = slow.generate([[7, 8]] * 40, seed=5, max_tokens=5, ignore_eos=True)
        assert {tuple(each.token_ids) for each in answers} == {
            tuple(sim_token(5, position, client.welcome.vocab_size) for position in range(2, 7))
        }
        assert all(sum(len(delta.token_ids) for delta in each) == 100 for each in others)


def test_more_answers_than_the_node_ever_takes(slow: LLM) -> None:
    with pytest.raises(InvalidRequest, match="asks for 17 answers; the node takes 16"):
        slow.generate("a", n=17)


def test_threads_share_it(slow: LLM) -> None:
    lengths: list[int] = []

    def run(tokens: int) -> None:
        answers = slow.generate([[1, 2]] * 12, max_tokens=tokens, ignore_eos=True)
        lengths.extend(len(each.token_ids) for each in answers)

    threads = [threading.Thread(target=run, args=(tokens,)) for tokens in (3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(lengths) == [3] * 12 + [4] * 12 + [5] * 12


@pytest.mark.parametrize("actor", ["router", "g0.worker0"])
def test_the_death_of_an_actor_costs_no_answer(slow: LLM, actor: str) -> None:
    before = pids(slow.name)[actor]
    killer = threading.Timer(0.1, os.kill, (before, signal.SIGKILL))
    killer.start()
    answers = slow.generate([[3, 4]] * 60, seed=9, max_tokens=30, ignore_eos=True)
    killer.join()
    assert len({tuple(each.token_ids) for each in answers}) == 1
    assert [len(each.token_ids) for each in answers] == [30] * 60
    wait_for("the actor is back", lambda: pids(slow.name).get(actor, before) != before, 5)


def test_an_interrupt_cancels_the_batch(slow: LLM) -> None:
    main = threading.main_thread().ident
    assert main is not None
    # What started the tests may have had it ignored: a shell does that to jobs behind an `&`.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT)).start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            slow.generate([[1, 2]] * 50, max_tokens=400, ignore_eos=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 2
    wait_for("all is cancelled", lambda: in_flight(slow) == 0, 2)


def test_a_forked_child_leaves_it_alone(slow: LLM) -> None:
    child = os.fork()
    if child == 0:
        try:
            slow.generate("a")
        except NodeNotRunning:
            slow.close()
            del slow
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert len(slow.generate([[1, 2]], max_tokens=3, ignore_eos=True)[0].token_ids) == 3
