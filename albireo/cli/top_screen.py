"""How `albireo top` draws a Picture: rich renderables, and nothing else.

Colours of the tasks T1 to T5 are those of the trace page and of the gateway's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import (
    Console,
    ConsoleOptions,
    Group,
    JustifyMethod,
    RenderableType,
    RenderResult,
)
from rich.padding import Padding
from rich.panel import Panel
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from albireo.live.percentiles import Percentiles
from albireo.live.picture import ActorPicture, GroupPicture, Picture

from .top_cells import (
    FAINT,
    NONE,
    bar,
    duration,
    faint,
    latency,
    meter,
    ms,
    number,
    or_none,
    sparks,
    us,
)

TASKS = (
    ("schedule", "T1", "#a283ec", "#5d5080"),
    ("input", "T2", "#eab04f", "#7d6434"),
    ("forward", "T3", "#4b95e8", "#34587f"),
    ("sample", "T4", "#37bd9b", "#2a6a5b"),
    ("output", "T5", "#ee7f9a", "#7f4c5b"),
)
"""Name in a group's stages, label, colour of what the device waits for, and of what it does not."""

_IDLE = "#ff665c"
_STATES = {"ready": "green", "failed": "red", "dead": "red", "stopped": "red"}
_STAGE_WIDTH = 58
_ACTOR_WIDTH = 38

HELP = (
    ("q", "quit"),
    ("space", "look now"),
    ("p", "pause, and go on"),
    ("+ -", "look more or less often"),
    ("s", "sort processes by CPU, or by name"),
    ("↑ ↓ PgUp PgDn", "scroll"),
    ("h ?", "this help"),
)


class Screen:
    """The picture in a window of the terminal's height, above a line of keys.

    scroll: lines that are above the window.  When drawn it is put right where
    it is too large, and `page` is the height of the window.
    """

    def __init__(self) -> None:
        self.body: RenderableType = ""
        self.keys: RenderableType = ""
        self.scroll = 0
        self.page = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = options.height or console.height
        lines = console.render_lines(self.body, options.update(height=None), new_lines=True)
        self.page = max(1, height - 1)
        self.scroll = max(0, min(self.scroll, len(lines) - self.page))
        shown = lines[self.scroll : self.scroll + self.page]
        for line in shown:
            yield from line
        for _ in range(self.page - len(shown)):
            yield Segment("\n")
        yield from console.render_lines(self.keys, options.update(height=1))[0]


def dashboard(
    picture: Picture, speeds: Sequence[float] = (), by_cpu: bool = True
) -> RenderableType:
    """All of it.  speeds: tokens/s of the last moments, oldest first."""
    groups = Padding(_Groups(picture.groups), (1, 0, 0, 0))
    parts: list[RenderableType] = [_head(picture), _tiles(picture, speeds), groups]
    stages = [_stages(group) for group in picture.groups if group.stages is not None]
    if stages:
        parts += [
            Padding(_SideBySide(stages, _STAGE_WIDTH), (1, 0, 0, 0)),
            _legend(),
        ]
    parts += [_gpus(picture), _actors(picture.actors, by_cpu)]
    return Padding(Group(*parts), (0, 1))


def absent(node: str, why: str) -> RenderableType:
    """Instead of a picture, while there is no node."""
    text = Text.assemble((f"node {node} is not there\n\n", "bold yellow"), (why, FAINT),
                         ("\n\nwaiting for it", ""))  # fmt: skip
    return Padding(Panel(text, box=box.ROUNDED, border_style=FAINT, padding=(1, 2)), (1, 2))


def help_page() -> RenderableType:
    table = Table.grid(padding=(0, 3))
    for key, text in HELP:
        table.add_row(Text(key, "bold"), text)
    title = Text("keys of albireo top", "bold")
    return Padding(
        Panel(Group(title, "", table), box=box.ROUNDED, border_style=FAINT, padding=(1, 2)), (1, 2)
    )


def key_line(interval_s: float, paused: bool, by_cpu: bool) -> Text:
    text = Text(" ", no_wrap=True, overflow="crop")
    for key, what in (
        ("q", "quit"), ("h", "help"), ("space", "now"), ("p", "go on" if paused else "pause"),
        ("+-", f"every {interval_s:g} s"), ("s", "by name" if by_cpu else "by CPU"),
    ):  # fmt: skip
        text.append(f" {key} ", "reverse").append(f" {what}   ", FAINT)
    if paused:
        text.append("paused", "bold yellow")
    return text


# ---------------------------------------------------------------- parts
def _head(picture: Picture) -> RenderableType:
    model = picture.model
    left = Text.assemble(
        ("● ", "#eab04f"), ("albireo ", "bold"), (picture.node, "bold"),
        (f"  {model['id']} · {model['dtype']} on {model['device']} · "
         f"{len(picture.groups)} group{'s' * (len(picture.groups) != 1)}", FAINT),
        no_wrap=True, overflow="ellipsis",
    )  # fmt: skip
    if picture.draining:
        left.append("  draining", "bold yellow")
    line = Table.grid(expand=True)
    line.add_column(ratio=1)
    line.add_column(justify="right", no_wrap=True)
    line.add_row(left, Text(f"up {duration(picture.uptime_s)}", FAINT))
    return Padding(line, (0, 0, 1, 0))


def _tiles(picture: Picture, speeds: Sequence[float]) -> RenderableType:
    rates, requests = picture.rates, picture.requests
    running = sum(group.running or 0 for group in picture.groups)
    waiting = sum(group.waiting or 0 for group in picture.groups)
    waiting += requests["waiting_for_group"] + requests["tokenizing"]
    tiles = [
        _tile("tokens/s", number(rates.tokens_per_s), Text(sparks(speeds, 14), "#4b95e8")),
        _tile("prompt tokens/s", number(rates.prompt_tokens_per_s), faint("computed")),
        _tile("running", str(running), faint(f"{waiting} waiting")),
        _tile("TTFT P50", *_latency_tile(rates.ttft)),
        _tile("ITL P50", *_latency_tile(rates.itl)),
    ]
    if picture.energy is not None:
        a_token = picture.energy.j_per_token
        tiles.append(
            _tile("power", f"{picture.energy.power_w:,.0f} W",
                  faint("no tokens" if a_token is None else f"{a_token:.2f} J/token"))
        )  # fmt: skip
    row = Table.grid(expand=True, padding=(0, 2))
    for _ in tiles:
        row.add_column(ratio=1)
    row.add_row(*tiles)
    return row


def _tile(name: str, value: str, below: Text) -> RenderableType:
    below.no_wrap = True
    return Group(Text(name, FAINT, no_wrap=True), Text(value, "bold", no_wrap=True), below)


def _latency_tile(found: Percentiles | None) -> tuple[str, Text]:
    if found is None:
        return "–", faint("no tokens")
    return ms(found.p50_ms), faint(f"P99 {ms(found.p99_ms)}")


class _Groups:
    """A row for each group; columns that a narrow terminal has no room for are left out."""

    def __init__(self, groups: Sequence[GroupPicture]) -> None:
        self._groups = groups

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        table = Table(box=None, header_style=FAINT, pad_edge=False, padding=(0, 2, 0, 0))
        names = [name for name, least, _, _ in _COLUMNS if width >= least]
        for name, least, justify, _ in _COLUMNS:
            if width >= least:
                table.add_column(name, justify=justify, no_wrap=True)
        whole = width >= _THREE_LATENCIES
        for group in self._groups:
            cells = {name: cell(group, whole) for name, _, _, cell in _COLUMNS}
            table.add_row(*(cells[name] for name in names))
        yield table


def _state(group: GroupPicture, whole: bool) -> RenderableType:
    return Text(group.state, _STATES.get(group.state, "yellow"))


def _kv(group: GroupPicture, whole: bool) -> RenderableType:
    return NONE if group.kv_usage is None else meter(group.kv_usage, 10 if whole else 6)


def _hits(group: GroupPicture, whole: bool) -> RenderableType:
    return NONE if group.prefix_hit_rate is None else f"{group.prefix_hit_rate:.0%}"


_THREE_LATENCIES = 112
_Cell = Callable[[GroupPicture, bool], RenderableType]
_COLUMNS: tuple[tuple[str, int, JustifyMethod, _Cell], ...] = (
    ("group", 0, "left", lambda group, whole: str(group.group)),
    ("state", 0, "left", _state),
    ("run", 0, "right", lambda group, whole: or_none(group.running)),
    ("wait", 0, "right", lambda group, whole: or_none(group.waiting)),
    ("KV cache", 0, "left", _kv),
    ("tok/s", 0, "right", lambda group, whole: number(group.rates.tokens_per_s)),
    ("prompt/s", 90, "right", lambda group, whole: number(group.rates.prompt_tokens_per_s)),
    ("TTFT", 76, "right", lambda group, whole: latency(group.rates.ttft, whole)),
    ("ITL", 76, "right", lambda group, whole: latency(group.rates.itl, whole)),
    ("cached", 100, "right", _hits),
    ("preempted", 112, "right", lambda group, whole: or_none(group.preemptions)),
)
"""Name, narrowest screen, side, and what a group has there; `whole`: there is room for all."""


class _SideBySide:
    """Blocks of one width in as many columns as there is room for."""

    def __init__(self, blocks: Sequence[RenderableType], width: int) -> None:
        self._blocks = blocks
        self._width = width

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = max(1, (options.max_width + 1) // (self._width + 1))
        grid = Table.grid(padding=(0, 1, 0, 0))
        for _ in range(columns):
            grid.add_column(width=min(self._width, options.max_width - 1))
        for first in range(0, len(self._blocks), columns):
            grid.add_row(*self._blocks[first : first + columns])
        yield grid


def _stages(group: GroupPicture) -> RenderableType:
    """T1 to T5 on the scale of a step: bright is what the device waited for, pale runs beside."""
    stages = group.stages
    assert stages is not None
    step_us = max(stages["step_us_mean"], 0.1)
    head = Text.assemble(
        (f"group {group.group} ", "bold"),
        (f"step {us(step_us)} · P99 {us(stages['step_us_p99'])} · ", FAINT),
        (f"serial {stages['serial_fraction']:.1%}", "bold"),
        no_wrap=True, overflow="crop",
    )  # fmt: skip
    table = Table.grid(padding=(0, 1))
    table.add_column(width=11)
    table.add_column(width=26)
    table.add_column(width=8, justify="right")
    table.add_column(width=8, justify="right")
    table.add_row(faint("task"), faint("share of the step"), faint("time"), faint("waited"))
    for name, label, colour, pale in TASKS:
        task = stages[name]
        exposed = min(1.0, task["exposed_us"] / step_us)
        hidden = max(0.0, min(1.0, task["mean_us"] / step_us) - exposed)
        table.add_row(
            Text(f"{label} {name}", colour),
            bar(26, [(exposed, colour), (hidden, pale)]),
            us(task["mean_us"]),
            Text(us(task["exposed_us"]), "" if task["exposed_us"] >= 0.05 else FAINT),
        )
    idle_us = stages["idle_us_mean"]
    table.add_row("idle", bar(26, [(idle_us / step_us, _IDLE)]), us(idle_us), "")
    return Padding(Group(head, table), (0, 0, 1, 0))


def _legend() -> RenderableType:
    return faint("bright: the device waits for it · pale: beside the forward pass, costs nothing")


def _gpus(picture: Picture) -> RenderableType:
    if picture.no_gpu:
        return Padding(faint(picture.no_gpu), (1, 0, 0, 0))
    table = Table(box=None, header_style=FAINT, pad_edge=False, padding=(0, 2, 0, 0))
    for column, justify in (
        ("GPU", "left"), ("group", "right"), ("busy", "left"), ("memory", "left"),
        ("power", "right"), ("°C", "right"), ("group: power", "right"), ("J/token", "right"),
    ):  # fmt: skip
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for group in picture.groups:
        energy = group.energy
        for place, gpu in enumerate(group.gpus):
            first = place == 0 and energy is not None
            memory = None
            if gpu.memory_used_bytes is not None and gpu.memory_total_bytes:
                memory = gpu.memory_used_bytes / gpu.memory_total_bytes
            table.add_row(
                gpu.name,
                str(group.group),
                NONE if gpu.utilization is None else meter(gpu.utilization, 10),
                NONE if memory is None else meter(memory, 10),
                NONE if gpu.power_w is None else f"{gpu.power_w:,.0f} W",
                NONE if gpu.temperature_c is None else f"{gpu.temperature_c:.0f}",
                f"{energy.power_w:,.0f} W" if first and energy else "",
                "" if not first or not energy else (
                    NONE if energy.j_per_token is None else f"{energy.j_per_token:.3f}"
                ),
            )  # fmt: skip
    return Padding(table, (1, 0, 0, 0))


def _actors(actors: Sequence[ActorPicture], by_cpu: bool) -> RenderableType:
    if by_cpu:
        actors = sorted(actors, key=lambda each: -(each.cpu or 0.0))
    cells = [_actor_cell(each) for each in actors]
    head = Text.assemble(("processes ", "bold"), ("share of a core", FAINT))
    return Padding(Group(head, _SideBySide(cells, _ACTOR_WIDTH)), (1, 0, 0, 0))


def _actor_cell(actor: ActorPicture) -> RenderableType:
    cell = Table.grid(padding=(0, 1))
    for width in (15, 7, 5, 9):
        cell.add_column(width=width, no_wrap=True, justify="right" if width == 5 else "left")
    notes = Text(str(actor.pid), FAINT)
    if actor.state != "ready":
        notes = Text(actor.state, _STATES.get(actor.state, "yellow"))
    elif actor.restarts:
        notes.append(f" ↻{actor.restarts}", "yellow")
    cpu = NONE if actor.cpu is None else Text(f"{actor.cpu:.0%}", "" if actor.cpu else FAINT)
    busy = (actor.cpu or 0.0) / actor.threads
    cell.add_row(actor.name, bar(7, [(busy, "#4b95e8")]), cpu, notes)
    return cell
