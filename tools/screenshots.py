"""Makes the pictures of docs/: the gateway's page and `albireo top`, at work with the demo model.

    .venv/bin/python tools/screenshots.py        # needs Chromium (Debian: apt-get install chromium)

A node with two groups on the CPU serves some streams meanwhile; everything but
the pictures is in a temporary directory.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.terminal_theme import TerminalTheme  # noqa: E402

from albireo.cli.top_screen import Screen, dashboard, key_line  # noqa: E402
from albireo.client import AlbireoError, Client  # noqa: E402
from albireo.live.watch import NodeWatch  # noqa: E402
from albireo.node.events import Event, NodeReady  # noqa: E402
from albireo.node.launch import run_detached, stop_node  # noqa: E402
from albireo.node.options import NodeOptions  # noqa: E402
from tools.browser import Browser  # noqa: E402

NODE = "pictures"
STREAMS = 4
WARM_S = 45
WIDTH, HEIGHT = 1440, 900
COLUMNS, LINES = 122, 33
QUESTION = "What is a double star? Answer in two sentences."
STORY = "Tell a story about a lighthouse keeper who counts the stars. "
_GROUND = (16, 20, 27)
_THEME = TerminalTheme(
    _GROUND,
    (228, 233, 242),
    [(42, 49, 64), (255, 102, 92), (55, 189, 155), (234, 176, 79),
     (75, 149, 232), (162, 131, 236), (55, 189, 155), (228, 233, 242)],
    [(110, 122, 146), (255, 102, 92), (55, 189, 155), (234, 176, 79),
     (75, 149, 232), (162, 131, 236), (55, 189, 155), (255, 255, 255)],
)  # fmt: skip
_SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>{styles} .{unique_id}-matrix {{ font-family: "DejaVu Sans Mono", monospace;
font-size: {char_height}px; line-height: {line_height}px; }}</style>
<rect width="100%" height="100%" fill="#10141b"/>
<defs>{lines}</defs>
<g transform="translate(9, 12)">{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g></svg>"""


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="albireo-pictures-") as scratch:
        os.environ["ALBIREO_RUNTIME_DIR"] = f"{scratch}/run"
        os.environ["ALBIREO_STATE_DIR"] = f"{scratch}/state"
        events: list[Event] = []
        options = NodeOptions(name=NODE, model="demo", groups=(1, 1), http="127.0.0.1:0")
        if run_detached(options, events.append) != 0:
            print(events, file=sys.stderr)
            return 1
        ready = next(each for each in events if isinstance(each, NodeReady))
        stopping = threading.Event()
        for number in range(STREAMS):
            threading.Thread(target=load, args=(number, stopping), daemon=True).start()
        try:
            with Browser(WIDTH, HEIGHT) as browser:
                picture_page(browser, str(ready.facts["http"]))
                picture_top(browser, Path(scratch))
        finally:
            stopping.set()
            stop_node(NODE, now=True, timeout_s=20)
    return 0


def load(number: int, stopping: threading.Event) -> None:
    """One stream after the other; half of a prompt is what all have in common."""
    try:
        with Client.connect(node=NODE) as client:
            for turn in range(10_000):
                prompt = STORY * 4 + f"It is night {turn} of keeper {number}."
                for _ in client.stream(prompt, max_tokens=40 + 15 * number, ignore_eos=True):
                    if stopping.is_set():
                        return
    except AlbireoError:
        if not stopping.is_set():
            raise


def picture_page(browser: Browser, url: str) -> None:
    browser.open(url)
    browser.wait_for("document.querySelectorAll('.group').length === 2")
    browser.type("#message", QUESTION, enter=True)
    done = "document.querySelector('.facts')?.innerText && !document.querySelector('.busy')"
    browser.wait_for(done, 120)
    time.sleep(WARM_S)
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        browser.resize(WIDTH, HEIGHT, 1.5)
        time.sleep(1.2)
        save(browser, f"page-{scheme}.png")
    browser.resize(390, 844, 2, mobile=True)
    time.sleep(1.2)
    save(browser, "page-phone.png")


def picture_top(browser: Browser, scratch: Path) -> None:
    watch = NodeWatch(NODE)
    speeds = []
    for _ in range(16):
        picture = watch.see()
        speeds.append(picture.rates.tokens_per_s or 0.0)
        time.sleep(1.0)
    watch.close()
    screen = Screen()
    screen.body, screen.keys = dashboard(picture, speeds[2:]), key_line(1.0, False, True)
    console = Console(width=COLUMNS, height=LINES, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(screen, height=LINES)
    text = console.export_svg(theme=_THEME, code_format=_SVG, font_aspect_ratio=0.602)
    drawing = scratch / "top.svg"
    drawing.write_text(text, "utf-8")
    width, height = (float(each) for each in text.split('viewBox="0 0 ')[1].split('"')[0].split())
    browser.open(drawing.as_uri())
    browser.resize(round(width), round(height), 1.25)
    save(browser, "top.png")


def save(browser: Browser, name: str) -> None:
    """Flat colours need no more than 256 of them; the rare ones are kept."""
    path = ROOT / "docs" / name
    browser.screenshot(path)
    with Image.open(path) as image:
        image.convert("RGB").quantize(
            256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
        ).save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    sys.exit(main())
