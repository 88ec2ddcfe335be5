"""The live start-up display of `albireo node start`: phase, seconds, ready line."""

from __future__ import annotations

import os
import time
from typing import Self

from rich.console import Console

from albireo.node.events import (
    Event,
    NodeFailed,
    NodeNote,
    NodeReady,
    NodeStopped,
    PhaseBegun,
    in_words,
)
from albireo.node.options import NodeOptions


class StartDisplay:
    """Shows a supervisor's events on the terminal, a line for each phase with its time.

    It writes to standard error through a descriptor of its own: the supervisor
    points the process's standard error at the node's log.
    """

    def __init__(self, options: NodeOptions) -> None:
        self._name = options.name
        self._console = Console(file=os.fdopen(os.dup(2), "w", buffering=1), highlight=False)
        self._status = self._console.status("")
        self._phase: str | None = None
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *ended: object) -> None:
        """The terminal has its cursor back, however this ends."""
        self._status.stop()

    def show(self, event: Event) -> None:
        if isinstance(event, PhaseBegun):
            self._end_phase()
            self._phase, self._since = event.text, time.monotonic()
            self._status.update(f"{event.text} ...")
            self._status.start()
        elif isinstance(event, NodeReady):
            self._end_phase()
            self._ready(event)
        elif isinstance(event, NodeNote):
            self._console.print(f"[yellow]{event.text}[/yellow]", markup=True, soft_wrap=True)
        elif isinstance(event, NodeFailed):
            self._end_phase(ok=False)
            self._console.print("[red]the node did not run:[/red]", end=" ")
            self._console.print(event.reason, markup=False, soft_wrap=True)
        elif isinstance(event, NodeStopped):
            self._end_phase(ok=False)
            self._console.print(f"node {self._name} has stopped", markup=False)

    def _end_phase(self, ok: bool = True) -> None:
        self._status.stop()
        if self._phase is not None:
            seconds = time.monotonic() - self._since
            mark = "[green]✓[/green]" if ok else "[red]✗[/red]"
            self._console.print(f"  {mark} {self._phase}  [dim]{seconds:.2f} s[/dim]")
        self._phase = None

    def _ready(self, event: NodeReady) -> None:
        facts = event.facts
        degrees = facts["groups"]
        groups = ", ".join(f"{degrees.count(t)}x{t}" for t in dict.fromkeys(degrees))
        self._console.print(
            f"  {facts['model']} · {groups} on {facts['device']} · {facts['dtype']} · context "
            f"{facts['max_model_len']} · KV cache {min(facts['kv_tokens']):,} tokens a group",
            soft_wrap=True,
        )
        self._console.print(f"  {facts['core_plan']}", soft_wrap=True)
        if phases_s := facts["phases_s"]:
            last = max(phases_s, key=lambda name: sum(phases_s[name].values()))
            self._console.print(f"  {last}: {in_words(phases_s[last])}", soft_wrap=True)
        self._console.print(
            f"[bold green]ready[/bold green] in {event.seconds:.1f} s · node {facts['name']} "
            f"(pid {facts['pid']}) · socket {facts['socket']}",
            soft_wrap=True,
        )
        places = [facts[key] for key in ("http", "uds") if facts.get(key)]
        if places:
            self._console.print(f"  OpenAI API at {' and '.join(places)}", soft_wrap=True)
        if facts.get("http"):
            self._console.print(
                f"  a page with the node and a chat at {facts['http']}/", soft_wrap=True
            )
        if facts.get("listen"):
            self._console.print(f"  client library at {facts['listen']}", soft_wrap=True)
