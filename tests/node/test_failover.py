"""Streams survive their group: kill -9 of its actors, and every token is as if nothing had been."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from albireo.client import AlbireoError, Client, Delta

from .processes import pids, status, wait_for, whole

pytestmark = pytest.mark.node

STREAMS = 6
WELL_UNDER_WAY = 5


class Story:
    """Streams of one client each, and when their tokens came.

    victim: stopped by the thread that takes the token with which the first stream has
    WELL_UNDER_WAY, so that no model is too fast for it, and killed when all streams are with
    their groups.
    """

    def __init__(self, node: str, params: dict[str, Any], victim: int | None = None) -> None:
        self.texts = [""] * STREAMS
        self.tokens: list[list[int]] = [[] for _ in range(STREAMS)]
        self.times: list[list[float]] = [[] for _ in range(STREAMS)]
        self.errors: list[AlbireoError] = []
        self._lock = threading.Lock()
        self._connected = threading.Barrier(STREAMS)
        self._victim = victim
        self._node, self._params = node, params
        self._threads = [
            threading.Thread(target=self._run, args=(number,), daemon=True)
            for number in range(STREAMS)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        ends = 0
        try:
            with Client.connect(node=self._node) as client:
                self._connected.wait(20)  # none may be done before another has begun
                for delta in client.stream([5, 6, 7 + number], seed=number, **self._params):
                    self._take(number, delta)
                    ends += delta.end is not None
            assert ends == 1
        except AlbireoError as error:
            self.errors.append(error)

    def _take(self, number: int, delta: Delta) -> None:
        assert delta.index == len(self.tokens[number])
        self.tokens[number] += delta.token_ids
        self.texts[number] += delta.text
        self.times[number].append(time.monotonic())
        with self._lock:
            if self._victim is not None and len(self.tokens[number]) >= WELL_UNDER_WAY:
                os.kill(self._victim, signal.SIGSTOP)
                threading.Timer(0.2, _kill, (self._victim,)).start()
                self._victim = None

    def wait_for_tokens(self, count: int) -> None:
        wait_for("all streams run", lambda: all(len(each) >= count for each in self.tokens), 20)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        assert not self.errors, self.errors


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # Found hanging, it has been killed already.
        os.kill(pid, signal.SIGKILL)


def tell(node: str, params: dict[str, Any], victim: str | None = None) -> Story:
    """A story, in the middle of which somebody is killed."""
    story = Story(node, params, pids(node).get(victim or ""))
    story.join()
    return story


def tell_through_a_death(node: str, params: dict[str, Any], victim: str) -> Story:
    """Streams of which some went on elsewhere.  A model is done before a client that has to wait
    for a core sees its first tokens: then it is told once more."""
    for _ in range(5):
        wait_for("the node is whole", lambda: whole(node), 10)
        before = status(node)["requests"]["failed_over"]
        story = tell(node, params, victim)
        if status(node)["requests"]["failed_over"] > before:
            return story
    pytest.fail("all had ended before the kill, each time")


@pytest.mark.parametrize("victim", ["g0.worker0", "g0.scheduler", "g0.detokenizer"])
@pytest.mark.parametrize("groups", [(1, 1), (1,)])
def test_no_token_is_lost_or_repeated(
    start_node: Callable[..., str], tiny_model_dir: Path, victim: str, groups: tuple[int, ...]
) -> None:
    node = start_node(
        name="f", model=str(tiny_model_dir), load_format="dummy", device="sim", groups=groups,
        sim_step_ms=5.0,
    )  # fmt: skip
    params = {"max_tokens": 120, "ignore_eos": True}
    undisturbed = tell(node, params)
    story = tell(node, params, victim)
    assert story.tokens == undisturbed.tokens
    assert story.texts == undisturbed.texts
    counts = status(node)["requests"]
    assert counts["failed"] == 0 and counts["finished"] == 2 * STREAMS
    assert counts["failed_over"] == STREAMS // len(groups)
    wait_for("the node is whole again", lambda: whole(node), 3)


def test_a_model_goes_on_token_for_token(
    start_node: Callable[..., str], tiny_model_dir: Path
) -> None:
    """With penalties, stop strings, a temperature and log-probabilities."""
    node = start_node(
        name="m", model=str(tiny_model_dir), load_format="dummy", device="cpu", groups=(1, 1),
        dtype="float32", threads=1, batch_invariant=True,
    )  # fmt: skip
    params = {
        "max_tokens": 480, "ignore_eos": True, "temperature": 0.9, "top_p": 0.95, "top_k": 40,
        "repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": 0.3,
        "min_tokens": 470, "stop": ["zq"], "logprobs": 1, "logit_bias": {9: 1.5},
    }  # fmt: skip
    undisturbed = tell(node, params)
    story = tell_through_a_death(node, params, "g0.worker0")
    assert story.tokens == undisturbed.tokens
    assert story.texts == undisturbed.texts


def test_a_hang_is_a_pause(start_node: Callable[..., str], tiny_model_dir: Path) -> None:
    node = start_node(
        name="h", model=str(tiny_model_dir), load_format="dummy", device="sim", groups=(1,),
        sim_step_ms=5.0, step_timeout_s=0.5,
    )  # fmt: skip
    story = Story(node, {"max_tokens": 120, "ignore_eos": True})
    story.wait_for_tokens(WELL_UNDER_WAY)
    os.kill(pids(node)["g0.worker0"], signal.SIGSTOP)
    story.join()
    assert all(len(each) == 120 for each in story.tokens)
