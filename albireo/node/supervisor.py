"""The supervisor: starts, watches and restarts every process of a node, and ends them all.

One asyncio task per thing that can die.  It never touches a request: the
router hears from it which groups exist (Topology), which have died (GroupDown)
and when to drain.  Order of start: fork server (tokenizer, weights, kernels),
then router, tokenizer, gateways and all groups at once.  Order of stop: drain, stop,
kill, remove the runtime directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from albireo._version import __version__
from albireo.client import AsyncClient
from albireo.ipc.config import ActorSpec
from albireo.ipc.keys import KeyFileError
from albireo.ipc.link import Spoke
from albireo.ipc.messages import (
    Drained,
    GroupDown,
    Joined,
    TokenizerDown,
    ToSupervisor,
)
from albireo.ipc.open_files import raise_open_files

from .access import ListenSocket, check_access
from .blueprint import Blueprint, what_to_load
from .children import ActorProcess, StartError, Watched
from .drains import Drains
from .events import Event, NodeFailed, NodeNote, NodeReady, NodeStopped, PhaseBegun
from .fork_protocol import Loaded
from .group import Group, GroupTimes
from .helpers import Helpers
from .http_sockets import HttpSockets
from .log_file import keep_log_bounded
from .operations import Operations, serve_control
from .options import NodeOptions, OptionError
from .runtime_dir import RuntimeDir
from .single import Single
from .timelines import Timelines
from .topology import NUM_OWN, topology

log = logging.getLogger(__name__)

_PR_SET_CHILD_SUBREAPER = 36
_STOP_GRACE_S = 2.0
_LINK_POLL_S = 0.02


class Supervisor:
    """Runs one node; see `run`."""

    def __init__(
        self,
        options: NodeOptions,
        model_path: str,
        model_name: str,
        say: Callable[[Event], None],
    ) -> None:
        self._options = options
        self._say = say
        self._began = time.monotonic()
        self._load = what_to_load(options, model_path, model_name)
        self._blueprint: Blueprint
        self._groups: list[Group] = []
        self._singles: dict[str, Single] = {}
        self._restarts: Counter[str] = Counter()
        self._gateways = options.num_gateways
        self._hang_s = options.step_timeout_s
        self._http: HttpSockets
        self._listener: ListenSocket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._is_up = False
        self._stop_asked = 0
        self._stop_event = asyncio.Event()
        self._failure: str | None = None
        self._drains = Drains(lambda drain: self._link.send(drain))

    # ------------------------------------------------------------------ life of a node
    async def run(self) -> int:
        """Starts the node, keeps it alive until it is asked to stop; the exit status."""
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        raise_open_files()  # an actor takes four here, a client one in the router
        self._catch_signals()
        try:
            self._runtime = RuntimeDir.claim(self._options.name)
        except OptionError as error:
            self._say(NodeFailed(str(error)))
            return 1
        try:
            self._helpers = Helpers(self._runtime.path, self._note, self._count_restart)
            await self._run_claimed()
        except (StartError, OptionError, KeyFileError) as error:
            self._failure = str(error)
        except Exception as error:
            log.exception("the node has failed")
            self._failure = (
                f"{type(error).__name__}: {error} (`albireo node logs --name {self._options.name}` "
                "has the whole story)"
            )
        finally:
            self._runtime.remove()
            if hasattr(self, "_helpers"):
                await self._helpers.release()
        if self._failure is not None:
            self._say(NodeFailed(self._failure))
            return 1
        self._say(NodeStopped())
        return 0

    async def _run_claimed(self) -> None:
        """The node, with a runtime directory of its own and its janitor."""
        self._timelines = Timelines(self._runtime.path)
        try:
            self._open_sockets()
            await self._until_stopped(self._live())
        finally:
            await self._end_everything()
            if hasattr(self, "_http"):
                self._http.close()
            if self._listener is not None:
                self._listener.close()

    async def _live(self) -> None:
        """Start-up, then watching; returns only by an error."""
        self._phase("starting the fork server")
        self._runtime.write_facts(self._facts("starting"))
        self._plan_groups(await self._helpers.start(self._load, self._phase))
        self._phase(f"starting {self._count_processes()} processes")
        self._link: Spoke[Drained] = Spoke(
            str(self._runtime.path / "router.zmq"), "supervisor", ToSupervisor
        )
        self._link.send(Joined("supervisor", -1, 0, os.getpid()))
        self._spawn_task(keep_log_bounded(self._options.name))
        self._spawn_task(self._helpers.keep())
        self._add_single("router", "router", self._listener.fds if self._listener else {})
        self._add_single("tokenizer", "tokenizer", {})
        for number in range(self._gateways):
            self._add_single("gateway", f"gateway{number}", self._http.fds(number))
        for single in self._singles.values():
            self._spawn_task(single.run())
        self._spawn_task(self._listen())
        self._spawn_task(serve_control(self._runtime.path, self._operations))
        for group in self._groups:
            self._spawn_task(group.run())
        await self._everything_ready()
        seconds = time.monotonic() - self._began
        facts = self._facts("ready")
        self._runtime.write_facts(facts)
        self._is_up = True
        self._say(NodeReady(seconds, facts))
        # The keepers never return: a node whose groups have all failed lives on and says so.
        await asyncio.gather(*self._tasks)

    async def _everything_ready(self) -> None:
        """Waits for the first start of all; a group that fails before fails the node."""
        while True:
            self._check_start("failed", "restarting")
            if all(group.state == "ready" for group in self._groups) and all(
                single.ready for single in self._singles.values()
            ):
                break
            await asyncio.sleep(0.005)
        await self._seen_by_a_client()

    def _check_start(self, *wrong: str) -> None:
        """Raises StartError where a group is in such a state, and what a keeper has failed with."""
        for group in self._groups:
            if group.state in wrong:
                raise StartError(f"group {group.number} did not start: {group.reason}")
        for task in self._tasks:
            if task.done():
                task.result()

    async def _seen_by_a_client(self) -> None:
        """Waits until the router, asked as a client asks, knows every process and group."""
        expected = self._count_processes() + NUM_OWN
        async with await AsyncClient.connect(str(self._runtime.path / "api.sock")) as client:
            while True:
                tree = await client.status()
                if len(tree["actors"]) == expected and all(
                    group["state"] == "ready" for group in tree["groups"]
                ):
                    return
                self._check_start("failed")
                await asyncio.sleep(0.005)

    async def _until_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs the coroutine until it fails or the node is asked to stop, then drains."""
        task = asyncio.create_task(work)
        stop = asyncio.ensure_future(self._stop_event.wait())
        await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if task.done():
            task.result()
        else:
            await self._drain()
        for each in (task, *self._tasks):
            each.cancel()
        await asyncio.gather(task, *self._tasks, return_exceptions=True)

    async def _drain(self) -> None:
        """Lets requests in flight finish, until the time is over or a second signal comes."""
        router = self._singles.get("router")
        if router is None or router.actor is None or not router.ready:
            return
        timeout_s = self._options.shutdown_timeout_s
        self._say(NodeNote(f"stopping: requests in flight have {timeout_s:g} s; again to stop now"))
        waiting: list[asyncio.Task[Any]] = [
            asyncio.create_task(self._drains.finished(timeout_s)),
            asyncio.create_task(self._second_signal()),
            asyncio.create_task(router.actor.gone()),
        ]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for each in waiting:
            each.cancel()

    async def _end_everything(self) -> None:
        """Stops what runs, kills what does not stop; returns when no process is left."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        actors = self._actors()
        for actor in actors:
            actor.stop()
        processes: list[Watched] = [actor for actor in actors if actor.alive]
        if processes:
            await asyncio.wait([each.exited for each in processes], timeout=_STOP_GRACE_S)
        processes += self._helpers.fork_servers()
        for each in processes:
            each.kill()
        if processes:
            await asyncio.wait([each.exited for each in processes])
        if hasattr(self, "_link"):
            self._link.close()

    def _plan_groups(self, loaded: Loaded) -> None:
        """Decides everything about the groups, now that the model is known."""
        self._blueprint = Blueprint(self._options, self._load, loaded, str(self._runtime.path))
        options = self._options
        times = GroupTimes(options.max_group_restarts, options.start_timeout_s, self._hang_s)
        for number, engine in enumerate(self._blueprint.engines):
            self._groups.append(
                Group(
                    number,
                    engine,
                    self._blueprint.comm_bytes(number),
                    times,
                    self._blueprint.actor,
                    self._fork,
                    self._group_changed,
                    self._group_died,
                )
            )
        self._operations = Operations(self._groups, self._drains.finished, self._note)

    # ------------------------------------------------------------------ keeping things alive
    async def _fork(self, spec: ActorSpec, fds: dict[str, int]) -> ActorProcess:
        return await self._helpers.fork(spec, fds | {"timeline": self._timelines.create(spec)})

    def _add_single(self, role: str, name: str, fds: dict[str, int]) -> None:
        self._singles[name] = Single(
            role, name, fds, self._options.start_timeout_s, self._hang_s,
            self._blueprint.actor, self._fork, self._send_topology, self._single_died,
        )  # fmt: skip

    def _single_died(self, single: Single, incarnation: int, why: str) -> None:
        self._note(f"{why}; it is started again")
        if single.role == "tokenizer":
            self._link.send(TokenizerDown(incarnation))
        elif single.role == "router":
            self._drains.ask_again()
        self._count_restart(single.name)

    def _group_changed(self) -> None:
        """It has another state or other processes, which may have found out other things."""
        if self._is_up:
            with contextlib.suppress(OSError):  # no room for a file: that shall end no group
                self._runtime.write_facts(self._facts("ready"))
        self._send_topology()

    def _group_died(self, group: Group, reason: str, planned: bool) -> None:
        self._link.send(GroupDown(group.number, group.incarnation, reason, planned, group.detected))
        self._note(f"group {group.number} is down: {reason}")

    async def _listen(self) -> None:
        """Messages from the router: few, and none of them urgent."""
        while True:
            for message in self._link.drain():
                self._drains.answered(message)
            await asyncio.sleep(_LINK_POLL_S)

    def _send_topology(self) -> None:
        helpers = self._helpers.processes()
        self._link.send(topology(self._actors(), self._groups, helpers, self._restarts))

    # ------------------------------------------------------------------ small things
    def _open_sockets(self) -> None:
        """Binds those of gateways and router.  Raises OptionError, KeyFileError."""
        options = self._options
        warning = check_access(options)
        https = options.ssl_certfile is not None
        self._http = HttpSockets(options.http, options.uds, self._gateways, tls=https)
        if options.listen is not None:
            self._listener = ListenSocket(options.listen)
        if warning is not None:
            self._note(warning)

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        self._stop_asked += 1
        self._stop_event.set()

    async def _second_signal(self) -> None:
        while self._stop_asked < 2:
            await asyncio.sleep(0.05)

    def _spawn_task(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    def _actors(self) -> list[ActorProcess]:
        singles = [single.actor for single in self._singles.values()]
        return [
            *(actor for actor in singles if actor is not None),
            *(actor for group in self._groups for actor in group.actors),
        ]

    def _count_processes(self) -> int:
        """Of router, tokenizer, gateways and groups."""
        return 2 + self._gateways + sum(2 + tp for tp in self._options.groups)

    def _count_restart(self, role: str) -> None:
        self._restarts[role] += 1
        self._send_topology()

    def _phase(self, text: str) -> None:
        log.info("%s", text)
        self._say(PhaseBegun(text))

    def _note(self, text: str) -> None:
        log.warning("%s", text)
        self._say(NodeNote(text))

    def _facts(self, state: str) -> dict[str, object]:
        """What node.json says."""
        facts: dict[str, object] = {
            "name": self._options.name,
            "pid": os.getpid(),
            "state": state,
            "version": __version__,
            "model": self._load.model_name,
            "groups": list(self._options.groups),
            "socket": str(self._runtime.path / "api.sock"),
            "http": self._http.address,
            "uds": self._http.uds,
            "listen": self._listener.address if self._listener else None,
        }
        if state != "ready":
            return facts
        actors = self._actors()
        engines = [group.engine for group in self._groups]
        found = {
            "kv_tokens": [each.num_blocks * each.block_size for each in engines],
            "phases_s": {actor.name: actor.phases_s for actor in actors if actor.phases_s},
            "details": {actor.name: actor.detail for actor in actors if actor.detail},
        }
        return facts | self._blueprint.facts() | found
