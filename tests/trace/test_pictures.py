"""Chrome traces and HTML pages of a stretch, from timelines made by hand and from a real node."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from albireo.client import Client
from albireo.ipc.stages import Stage
from albireo.trace.capture import CaptureError, Stretch, capture
from albireo.trace.chrome import chrome_trace
from albireo.trace.page import html_page

from .synthetic import Span, write, write_group

ALBIREO = str(Path(sys.executable).with_name("albireo"))


@pytest.fixture
def stretch(tmp_path: Path) -> Stretch:
    write_group(tmp_path, 40)
    write_group(tmp_path, 30, group=1)
    routed: list[Span] = [(Stage.ROUTE, 0xFFFFFFFF, n * 1_000_000, n * 1_000_000 + 9000)
                          for n in range(1, 40)]  # fmt: skip
    write(tmp_path, "router.0", routed)
    return capture(tmp_path, 20, last=True, timeout_s=0)


def test_the_last_steps(stretch: Stretch, tmp_path: Path) -> None:
    assert stretch.steps == 20 and stretch.begin_ns == 1_000_000 + 20 * 1_000_000 + 20_000
    assert [row.name for row in stretch.rows] == [
        "router", "g0.scheduler", "g0.worker0", "g0.device0", "g0.detokenizer",
        "g1.scheduler", "g1.worker0", "g1.device0", "g1.detokenizer",
    ]  # fmt: skip
    assert stretch.stats[0].serial_fraction == 0.1
    assert capture(tmp_path, 1000, last=True, timeout_s=0).steps == 40


def test_nothing_to_show(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="has not computed a step yet"):
        capture(tmp_path, 5, last=True, timeout_s=0)
    write_group(tmp_path, 9)
    with pytest.raises(CaptureError, match=r"0 of 5 steps came in 0 s.*--last"):
        capture(tmp_path, 5, last=False, timeout_s=0)
    with pytest.raises(CaptureError, match="1 to 2,048"):
        capture(tmp_path, 5000, last=True, timeout_s=0)


def check_chrome(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """What the trace-event format asks for; the spans."""
    threads, spans = set(), []
    for event in trace["traceEvents"]:
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert event["args"]
            threads.add((event["pid"], event["tid"]))
        else:
            assert event["ph"] == "X" and event["name"] and event["cat"]
            assert isinstance(event["ts"], float) and event["dur"] >= 0
            assert (event["pid"], event["tid"]) in threads
            spans.append(event)
    return spans


def test_chrome(stretch: Stretch) -> None:
    spans = check_chrome(json.loads(json.dumps(chrome_trace(stretch))))
    forward = [e for e in spans if e["name"] == "forward" and e["pid"] == 1]
    assert len(forward) == 20 and {e["dur"] for e in forward} == {900.0}
    idle = [e for e in spans if e["name"] == "idle" and e["pid"] == 1]
    assert len(idle) == 19 and {e["dur"] for e in idle} == {20.0}
    assert "step" not in next(e for e in spans if e["name"] == "route")["args"]


class Page(HTMLParser):
    """Collects elements; a page that does not parse leaves some open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.data = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert "src" not in given and "href" not in given, "the page needs another file"
        if given.get("id"):
            self.ids.add(str(given["id"]))
        self.last = given.get("id")
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script" and self.last == "data":
            self.data += data


def test_the_page_is_whole(stretch: Stretch) -> None:
    text = html_page(stretch)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text), "the page needs the network"
    page = Page(text)
    assert page.open == []
    # What the script looks up is there.
    assert set(re.findall(r'byId\("(\w+)"\)', text)) <= page.ids
    data = json.loads(page.data)
    device = next(row for row in data["rows"] if row["name"] == "g0.device0")
    assert len(device["spans"]) == 5 * 40 and len(device["idle"]) == 3 * 19
    assert data["stats"]["0"]["steps"] == 19 and data["stages"]["5"] == ["forward", 3]


def test_a_name_cannot_break_the_page(stretch: Stretch) -> None:
    bad = Stretch(
        "</script><script>alert(1)", stretch.begin_ns, stretch.end_ns, 1, stretch.rows, {}
    )
    page = Page(html_page(bad))
    assert json.loads(page.data)["node"] == bad.node


@pytest.mark.node
def test_a_real_node(
    start_node: Callable[..., str], tiny_model_dir: Path, node_home: Path, tmp_path: Path
) -> None:
    """Every actor is there, every step once, and each step is planned before the one before ends.

    A single plan may come late on a busy machine; the next are early again.  Steps are longer
    than the turns that processes take on a core.
    """
    node = start_node(
        name="t", model=str(tiny_model_dir), device="sim", sim_step_ms=20.0, groups=(1, 3)
    )
    ended = threading.Event()

    def work() -> None:
        with Client.connect(node=node) as client:
            while not ended.is_set():
                for stream in [client.stream(f"abc{n}", max_tokens=40, ignore_eos=True)
                               for n in range(8)]:  # fmt: skip
                    list(stream)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for output in ("trace.html", "trace.json"):
            done = subprocess.run(
                [ALBIREO, "trace", "--name", node, "--steps", "60", "-o", str(tmp_path / output)],
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        with Client.connect(node=node) as client:
            groups = client.status()["groups"]
    finally:
        ended.set()
        worker.join(30)
    for group in groups:
        assert group["stages"]["steps"] > 10
        assert 19_900 < group["stages"]["step_us_median"] < 20_100
    assert Page((tmp_path / "trace.html").read_text()).open == []
    trace = json.loads((tmp_path / "trace.json").read_text())
    spans = check_chrome(trace)
    names = {
        e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"
    }
    assert set(names.values()) >= {
        "router", "tokenizer", "g0.scheduler", "g0.worker0", "g0.device0", "g0.detokenizer",
        "g1.scheduler", "g1.worker2", "g1.device2", "g1.detokenizer",
    }  # fmt: skip
    for group in (0, 1):
        of: dict[str, dict[int, float]] = {}
        for event in spans:
            name = names[event["tid"]]
            if not name.startswith(f"g{group}.") or "step" not in event["args"]:
                continue
            if name == f"g{group}.device0" and event["name"] == "forward":
                step = event["args"]["step"]
                assert step not in of.setdefault("forward", {}), "a step came twice"
            found = of.setdefault(event["name"], {})
            found[event["args"]["step"]] = event["ts"] + event["dur"]
        forward = of["forward"]
        steps = sorted(forward)
        assert len(steps) >= 55 and steps == list(range(steps[0], steps[-1] + 1))
        ahead = [of["plan"][n + 1] < forward[n] for n in steps if n + 1 in of["plan"]]
        assert len(ahead) > 40 and sum(ahead) > 0.9 * len(ahead)
