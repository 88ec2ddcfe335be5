"""Groups restarted, drained and started on request, under load."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from albireo.cli import main
from albireo.client import AlbireoError, Client
from albireo.node.operations import Order, give_order
from albireo.node.options import OptionError

from .processes import pids, status, wait_for, whole
from .test_failover import STREAMS, Story

pytestmark = pytest.mark.node


def states(node: str) -> list[str]:
    return [group["state"] for group in status(node)["groups"]]


@pytest.fixture
def load() -> Iterator[Callable[[str], list[AlbireoError]]]:
    """Short requests one after the other, until the end of the test; their errors."""
    over = threading.Event()
    threads: list[threading.Thread] = []

    def begin(node: str) -> list[AlbireoError]:
        errors: list[AlbireoError] = []

        def ask() -> None:
            with Client.connect(node=node) as client:
                while not over.is_set():
                    try:
                        client.generate([1, 2, 3], max_tokens=8, ignore_eos=True)
                    except AlbireoError as error:
                        errors.append(error)

        threads.append(threading.Thread(target=ask))
        threads[-1].start()
        return errors

    yield begin
    over.set()
    for thread in threads:
        thread.join(20)


@pytest.mark.parametrize("groups", [(1, 1), (1,)])
def test_no_client_notices_a_rolling_restart(
    start_node: Callable[..., str], tiny_model_dir: Path, groups: tuple[int, ...],
    load: Callable[[str], list[AlbireoError]],
) -> None:  # fmt: skip
    node = start_node(
        name="roll", model=str(tiny_model_dir), load_format="dummy", device="sim", groups=groups,
        sim_step_ms=5.0, max_failovers=0,
    )  # fmt: skip
    params = {"max_tokens": 300, "ignore_eos": True}
    undisturbed = Story(node, params)
    undisturbed.join()
    before = pids(node)
    errors = load(node)
    story = Story(node, params)
    story.wait_for_tokens(5)
    done = CliRunner().invoke(
        main, ["node", "restart-group", "all", "--timeout", "0.3", "--name", node]
    )
    assert done.exit_code == 0, done.output
    assert [line for line in done.output.splitlines() if "is ready" in line] == [
        f"group {number} is ready" for number in range(len(groups))
    ]
    story.join()
    assert story.tokens == undisturbed.tokens
    assert errors == []
    after = pids(node)
    assert {name for name in before if after[name] != before[name]} == {
        f"g{number}.{role}"
        for number in range(len(groups))
        for role in ("scheduler", "detokenizer", "worker0")
    }
    counts = status(node)["requests"]
    assert counts["failed"] == 0
    assert counts["failed_over"] >= STREAMS, "the streams are longer than the time they got"


def test_a_drained_group_finishes_and_stays_away(
    start_node: Callable[..., str], tiny_model_dir: Path
) -> None:
    node = start_node(
        name="drain", model=str(tiny_model_dir), load_format="dummy", device="sim", groups=(1, 1),
        sim_step_ms=5.0,
    )  # fmt: skip
    story = Story(node, {"max_tokens": 80, "ignore_eos": True})
    story.wait_for_tokens(5)
    said = list(give_order(node, Order(action="drain", group=1, timeout_s=20)))
    assert said[-1] == "group 1 has stopped"
    assert states(node) == ["ready", "stopped"]
    assert not [name for name in pids(node) if name.startswith("g1.")]
    story.join()
    assert status(node)["requests"]["failed_over"] == 0, "they had time to finish"
    with pytest.raises(OptionError, match=r"group 1 is stopped, not ready.*start-group 1`"):
        list(give_order(node, Order(action="drain", group=1, timeout_s=1)))
    assert list(give_order(node, Order(action="start", group=-1, timeout_s=0))) == [
        "group 0 is ready already", "group 1 is ready",
    ]  # fmt: skip
    list(give_order(node, Order(action="drain", group=1, timeout_s=1)))
    said = list(give_order(node, Order(action="drain", group=-1, timeout_s=1)))
    assert said[-2:] == ["group 0 has stopped", "group 1 is stopped already"]
    with Client.connect(node=node) as client, pytest.raises(AlbireoError, match="none of the node"):
        client.generate([1, 2], max_tokens=3)
    assert list(give_order(node, Order(action="start", group=-1, timeout_s=0))) == [
        "group 0 is ready", "group 1 is ready",
    ]  # fmt: skip
    wait_for("the node is whole again", lambda: whole(node), 3)


@pytest.mark.parametrize(
    ("action", "most", "end", "state"),
    [
        ("restart", 12, "group 0 is ready", "ready"),
        ("drain", 12, "group 0 has stopped", "stopped"),
        ("restart", 0, "group 0 has failed: g0.worker0", "failed"),
    ],
)
def test_a_group_that_dies_while_it_drains(
    start_node: Callable[..., str], tiny_model_dir: Path, action: str, most: int, end: str,
    state: str,
) -> None:  # fmt: skip
    """What was asked for happens all the same."""
    node = start_node(
        name="both", model=str(tiny_model_dir), load_format="dummy", device="sim", groups=(1, 1),
        sim_step_ms=8.0, max_group_restarts=most,
    )  # fmt: skip
    story = Story(node, {"max_tokens": 400, "ignore_eos": True})
    story.wait_for_tokens(5)
    said: list[str] = []

    def give() -> None:
        try:
            said.extend(give_order(node, Order(action=action, group=0, timeout_s=60)))
        except OptionError as error:
            said.append(str(error))

    ordering = threading.Thread(target=give, daemon=True)
    ordering.start()
    wait_for("the group drains", lambda: states(node)[0] == "draining", 10)
    os.kill(pids(node)["g0.worker0"], signal.SIGKILL)
    ordering.join(30)
    assert not ordering.is_alive(), "the order is never done"
    assert end in said[-1]
    # Supervisor and router are told of it by turns.
    wait_for("the router knows, too", lambda: states(node) == [state, "ready"], 10)
    story.join()


def test_a_router_that_dies_while_a_group_drains(
    start_node: Callable[..., str], tiny_model_dir: Path
) -> None:
    """The next one knows of it: nobody waits for the end of the time."""
    node = start_node(
        name="next", model=str(tiny_model_dir), load_format="dummy", device="sim", groups=(1, 1),
        sim_step_ms=8.0,
    )  # fmt: skip
    with Client.connect(node=node, reconnect_s=0) as client:
        stream = client.stream([1, 2, 3], max_tokens=400, ignore_eos=True)
        next(iter(stream))
        group = next(each["group"] for each in status(node)["groups"] if each["in_flight"])
        said: list[str] = []
        order = Order(action="restart", group=group, timeout_s=60)
        ordering = threading.Thread(
            target=lambda: said.extend(give_order(node, order)), daemon=True
        )
        ordering.start()
        wait_for("the group drains", lambda: states(node)[group] == "draining", 10)
        os.kill(pids(node)["router"], signal.SIGKILL)
        ordering.join(30)
    assert not ordering.is_alive(), "the order was lost with the router"
    assert said[-1] == f"group {group} is ready"


def test_what_cannot_be_done_is_said(start_node: Callable[..., str], tiny_model_dir: Path) -> None:
    node = start_node(name="no", model=str(tiny_model_dir), load_format="dummy", device="sim")
    for arguments, message in (
        (["restart-group", "3"], "there is no group 3: the node has 0 to 0"),
        (["start-group", "0"], "group 0 runs already"),
        (["drain-group", "x"], "neither a group's number nor `all`"),
    ):
        result = CliRunner().invoke(main, ["node", *arguments, "--name", node])
        assert result.exit_code != 0
        assert message in result.output
    began = time.monotonic()
    result = CliRunner().invoke(main, ["node", "restart-group", "0", "--name", "nobody"])
    assert "no node named 'nobody' is running" in result.output
    assert time.monotonic() - began < 5
