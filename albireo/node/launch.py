"""Running a supervisor in this process, or in one that outlives it; and stopping one.

Used by `albireo node start|stop`, by the benches and by the tests.  A detached
supervisor writes its events as JSON lines into a pipe until it is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from albireo.ipc.paths import PathError, log_path

from .demo_model import DISPLAY_NAME, FetchError, fetch_demo_model
from .events import Event, NodeFailed, NodeReady, NodeStopped, PhaseBegun
from .log_file import open_log
from .options import NodeOptions, OptionError
from .runtime_dir import is_running, read_facts

_STOP_TIMEOUT_S = 30.0
_BETWEEN_SIGNALS_S = 0.05
_event_decoder = msgspec.json.Decoder(Event)

Say = Callable[[Event], None]


def run_foreground(options: NodeOptions, say: Say) -> int:
    """Runs the node in this process until it stops; the exit status.

    What is wrong with the options whatever the model is, is said before it is loaded.
    """
    try:
        options.check()
        path, name = _resolve_model(options, say)
        os.umask(0o077)
        _log_to_file(options)
    except (OptionError, PathError, FetchError) as error:
        say(NodeFailed(str(error)))
        return 1
    from .supervisor import Supervisor

    async def supervise() -> int:
        return await Supervisor(options, path, name, say).run()

    return asyncio.run(supervise())


def run_detached(options: NodeOptions, say: Say) -> int:
    """Starts a node that outlives this process; returns when it is ready, or has failed.

    Whoever interrupts this, or kills it, ends the node.
    """
    process = start_detached(options)
    assert process.stdout is not None
    try:
        with process.stdout:
            for line in process.stdout:
                event = _event_decoder.decode(line)
                say(event)
                if isinstance(event, NodeReady):
                    return 0
                if isinstance(event, (NodeFailed, NodeStopped)):
                    break
        return process.wait() or 1
    except BaseException:
        end_detached(process)
        raise


def end_detached(process: subprocess.Popen[bytes]) -> None:
    """Ends a node without waiting for requests; returns when its supervisor is gone.

    One that does not leave is killed; its processes, too, by the kernel, and the janitor clears
    away.
    """
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
        time.sleep(_BETWEEN_SIGNALS_S)
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def start_detached(options: NodeOptions, owner: int | None = None) -> subprocess.Popen[bytes]:
    """The process of a detached node; its standard output carries events as JSON lines.

    owner: this process's id, where the node is to end with it, however it ends.
    """
    words = [] if owner is None else [str(owner)]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "albireo.node.launch", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(options))
    process.stdin.close()
    return process


def stop_node(name: str, *, now: bool = False, timeout_s: float = 60.0) -> None:
    """Asks the node to stop and waits for its end.

    Raises OptionError when there is none, or when it does not end in time.
    """
    facts = read_facts(name)
    if facts is None or not is_running(name):
        raise OptionError(f"no node named {name!r} is running")
    pid = int(facts["pid"])
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with open(process, "rb"):
        signal.pidfd_send_signal(process, signal.SIGTERM)
        if now:
            time.sleep(_BETWEEN_SIGNALS_S)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGTERM)
        ended, _, _ = select.select([process], [], [], min(timeout_s, threading.TIMEOUT_MAX))
    if not ended:
        raise OptionError(
            f"node {name!r} (pid {pid}) has not stopped within {timeout_s:g} s; "
            "`albireo node stop --now` does not wait for requests in flight"
        )


def _resolve_model(options: NodeOptions, say: Say) -> tuple[str, str]:
    """Path of the model's files, and its name for people."""
    if options.model == "demo":
        path = fetch_demo_model(lambda text: say(PhaseBegun(text)))
        return str(path), DISPLAY_NAME
    path = Path(options.model).expanduser()
    if not path.exists():
        raise OptionError(
            f"--model {options.model}: there is no such file or directory; give a Hugging Face "
            "directory, a GGUF file, or `demo`"
        )
    return str(path.resolve()), path.resolve().name.removesuffix(".gguf")


def _log_to_file(options: NodeOptions) -> None:
    """Sends logging, and the standard error of all processes, to the node's log.

    Raises OptionError.
    """
    try:
        fd = open_log(options.name)
    except OSError as error:
        raise OptionError(
            f"the node's log {log_path(options.name)} cannot be written: "
            f"{error.strerror or error}; ALBIREO_STATE_DIR names another directory for it"
        ) from None
    sys.stderr.flush()
    # The console keeps a descriptor of its own for the display; see cli/display.py.
    os.dup2(fd, 2)
    os.close(fd)
    logging.basicConfig(
        level=options.log_level.upper(),
        format="%(asctime)s supervisor %(levelname)s %(message)s",
        stream=sys.stderr,
        force=True,
    )


def end_with(owner: int) -> None:
    """Has this process stop its node at once when its parent `owner` is gone.

    A pidfd tells that; the kernel's death signal would come already when the
    thread ends that started the node.
    """
    try:
        process = os.pidfd_open(owner)
    except ProcessLookupError:
        sys.exit(1)
    if os.getppid() != owner:
        sys.exit(1)

    def watch() -> None:
        select.select([process], [], [])
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(_BETWEEN_SIGNALS_S)

    threading.Thread(target=watch, name="owner", daemon=True).start()


def _main() -> None:
    """Entry point of a detached supervisor: options on stdin, events on stdout.

    An argument is the process that the node belongs to: then its log goes with it.  Nobody knows
    of a node whose starter is gone before it is ready: it stops.
    """
    owned = len(sys.argv) > 1
    if owned:
        end_with(int(sys.argv[1]))
    listening, ready = True, False

    def say(event: Event) -> None:
        nonlocal listening, ready
        if not listening:
            return
        try:
            sys.stdout.buffer.write(msgspec.json.encode(event) + b"\n")
            sys.stdout.buffer.flush()
            ready |= isinstance(event, NodeReady)
        except OSError:
            listening = False
            if not ready:
                os.kill(os.getpid(), signal.SIGTERM)

    try:
        options = msgspec.json.decode(sys.stdin.buffer.read(), type=NodeOptions)
    except msgspec.ValidationError as error:
        say(NodeFailed(str(error)))
        sys.exit(1)
    status = run_foreground(options, say)
    if owned and status == 0:
        for suffix in (".log", ".log.1"):
            Path(log_path(options.name)).with_suffix(suffix).unlink(missing_ok=True)
    sys.exit(status)


if __name__ == "__main__":
    _main()
