"""`albireo top`."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque

import click
import msgspec
from rich.console import Console
from rich.live import Live

from albireo.client import AlbireoError
from albireo.live.picture import Picture
from albireo.live.watch import NodeWatch

from .amounts import Amount
from .keyboard import Keyboard
from .node import name_option
from .top_screen import Screen, absent, dashboard, help_page, key_line

_INTERVALS_S = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_SPEEDS = 60
_ONCE_S = 1.0


@click.command()
@name_option
@click.option(
    "--interval", "-d",
    type=Amount(min=0.1, max=3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks.",
)  # fmt: skip
@click.option("--once", is_flag=True, help="Print one picture, and end.")
@click.option("--json", "as_json", is_flag=True, help="A line of JSON for each look.")
def top(name: str, interval: float, once: bool, as_json: bool) -> None:
    """Watch a node: groups, tokens, latencies, stages, GPUs and processes.

    q quits, h lists the keys.  It goes on when the node is started again.
    Output that is no terminal gets one picture, as with --once.
    """
    watch = NodeWatch(name)
    try:
        if as_json:
            _print_json(watch, interval, once)
        elif once or not sys.stdout.isatty():
            Console(highlight=False).print(dashboard(_first(watch)))
        else:
            _Top(watch, name, interval).run()
    except AlbireoError as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        # Nobody reads any more: the interpreter's last flush must not complain of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        watch.close()


def _first(watch: NodeWatch) -> Picture:
    """With rates, which need a second."""
    watch.see()
    time.sleep(_ONCE_S)
    return watch.see()


def _print_json(watch: NodeWatch, interval_s: float, once: bool) -> None:
    picture = _first(watch)
    while True:
        sys.stdout.write(msgspec.json.encode(picture).decode() + "\n")
        sys.stdout.flush()
        if once:
            return
        time.sleep(interval_s)
        picture = watch.see()


class _Looks:
    """Looks at the node from a thread, so that keys never wait for it.

    newest: a Picture, or why there is none.  After each look a byte can be read
    from `bell`.
    """

    def __init__(self, watch: NodeWatch, interval_s: float) -> None:
        self.interval_s = interval_s
        self.newest: Picture | AlbireoError | None = None
        self.bell, self._ring = os.pipe()
        self._watch = watch
        self._now = threading.Event()
        self._thread = threading.Thread(target=self._run, name="top", daemon=True)
        self._thread.start()

    def look_now(self) -> None:
        self._now.set()

    def _run(self) -> None:
        while True:
            try:
                self.newest = self._watch.see()
            except AlbireoError as error:
                self.newest = error
            os.write(self._ring, b".")
            self._now.wait(self.interval_s)
            self._now.clear()


class _Top:
    """The screen and its keys."""

    def __init__(self, watch: NodeWatch, node: str, interval_s: float) -> None:
        self._looks = _Looks(watch, interval_s)
        self._node = node
        self._screen = Screen()
        self._speeds: deque[float] = deque(maxlen=_SPEEDS)
        self._shown: Picture | AlbireoError | None = None
        self._paused = self._helps = False
        self._by_cpu = True

    def run(self) -> None:
        """Until somebody quits."""
        console = Console(highlight=False)
        with (
            Keyboard() as keys,
            Live(self._screen, console=console, screen=True, auto_refresh=False) as live,
        ):
            while True:
                self._draw()
                live.refresh()
                pressed = keys.wait(self._looks.bell)
                for key in pressed:
                    if key in ("q", "Q"):
                        return
                    self._press(key)
                if not pressed:
                    os.read(self._looks.bell, 64)
                    self._take()

    def _take(self) -> None:
        found = self._looks.newest
        if self._paused or found is None:
            return
        self._shown = found
        if isinstance(found, Picture):
            self._speeds.append(found.rates.tokens_per_s or 0.0)
        else:
            self._speeds.clear()

    def _press(self, key: str) -> None:
        screen, looks = self._screen, self._looks
        match key:
            case "h" | "?":
                self._helps = not self._helps
            case "escape":
                self._helps = False
            case "space":
                looks.look_now()
            case "p":
                self._paused = not self._paused
            case "s":
                self._by_cpu = not self._by_cpu
            case "+" | "=":
                looks.interval_s = max(
                    (each for each in _INTERVALS_S if each < looks.interval_s),
                    default=looks.interval_s,
                )
                looks.look_now()
            case "-":
                looks.interval_s = min(
                    (each for each in _INTERVALS_S if each > looks.interval_s),
                    default=looks.interval_s,
                )
            case "up" | "k":
                screen.scroll -= 1
            case "down" | "j":
                screen.scroll += 1
            case "page up":
                screen.scroll -= screen.page
            case "page down":
                screen.scroll += screen.page
            case "home":
                screen.scroll = 0

    def _draw(self) -> None:
        screen = self._screen
        screen.keys = key_line(self._looks.interval_s, self._paused, self._by_cpu)
        if self._helps:
            screen.body = help_page()
        elif isinstance(self._shown, Picture):
            screen.body = dashboard(self._shown, list(self._speeds), self._by_cpu)
        elif self._shown is not None:
            screen.body = absent(self._node, str(self._shown))
        else:
            screen.body = ""
