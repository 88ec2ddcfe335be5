"""The page at /, and GET /top which feeds it: on the wire, and in a real browser."""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
import re
import signal
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import pytest

from albireo.client import AlbireoError, Client, Unavailable
from albireo.gateway.page import _page
from albireo.ipc.keys import ApiKeys
from albireo.ipc.simulated import sim_token
from tools.browser import Browser, find_browser

from ..tiny_model import TINY_EOS, TINY_VOCAB
from .conftest import KEYS, MODEL, HttpNode
from .played import PlayedLink, get

KEY = KEYS["alice"]


# ---------------------------------------------------------------- on the wire
def test_the_page_is_confined_to_its_own_script_and_style() -> None:
    body, headers = _page()
    policy = dict(
        part.split(" ", 1)
        for part in dict(headers)[b"content-security-policy"].decode().split("; ")
    )
    text = body.decode()
    for element, rule in (("script", "script-src"), ("style", "style-src")):
        (found,) = re.findall(f"<{element}>(.*?)</{element}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(found.encode()).digest()).decode()
        assert policy[rule] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'" and policy["base-uri"] == "'none'"


class Outside(HTMLParser):
    """What a page would load, and what its policy would not let run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            loads = name in ("src", "href", "srcset", "action") and not (value or "").startswith(
                "data:"
            )
            if loads or name == "style" or name.startswith("on"):
                self.found.append((tag, name))


def test_the_page_has_no_outside() -> None:
    text = _page()[0].decode()
    parser = Outside()
    parser.feed(text)
    assert parser.found == []
    # The name of SVG's elements is no address that anybody asks.
    assert set(re.findall(r"https?://[^'\"\s]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in text and "@import" not in text and "url(" not in text


def test_the_tasks_have_the_colours_of_the_trace_page() -> None:
    text, trace = _page()[0].decode(), files("albireo.trace").joinpath("page.css").read_text()
    for task in range(1, 6):
        colours = [set(re.findall(rf"--t{task}: (#\w+)", each)) for each in (text, trace)]
        assert colours[0] == colours[1] and len(colours[0]) == 2


def test_the_page_is_open_and_what_it_shows_is_not() -> None:
    keys = ApiKeys([("alice", KEY)])
    page = get("/", keys=keys)
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert page.headers["x-content-type-options"] == "nosniff"
    assert get("/top", keys=keys).status_code == 401
    answer = get("/top", keys=keys, headers={"authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
    found = answer.json()
    assert found["groups"][0]["running"] == 3 and found["groups"][1]["running"] is None
    assert found["span_s"] > 0 and found["energy"] is None and "no GPU" in found["no_gpu"]


def test_without_a_router_top_is_503() -> None:
    class Lonely(PlayedLink):
        async def status(self) -> dict[str, Any]:
            raise Unavailable("the node's router does not answer", retry=True)

    answer = get("/top", Lonely())
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert issubclass(Unavailable, AlbireoError)


# ---------------------------------------------------------------- in a browser
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if find_browser() is None:
        pytest.skip("no Chromium is installed (on Debian: apt-get install chromium)")
    with Browser(1280, 800) as browser:
        yield browser


@pytest.mark.node
def test_a_visit(browser: Browser, http_node: HttpNode) -> None:
    """Someone comes without a key, looks, asks, stops an answer, and asks again."""
    browser.open(f"{http_node.http}/")
    browser.wait_for("document.querySelector('#keydialog').open")
    browser.type("#keyfield", "not-the-key", enter=True)
    browser.wait_for("document.querySelector('#keyerror').innerText.includes('does not know')")
    browser.type("#keyfield", KEY, enter=True)
    browser.wait_for("document.querySelectorAll('.group').length === 1")
    browser.wait_for("document.querySelector('#state').innerText === 'ready'")
    assert MODEL in browser.text("#about") and browser.text("#model") == MODEL
    assert "no GPU" in browser.text("#footnote")
    assert browser.run("document.title").endswith("tokens/s · http · Albireo")
    assert {"router", "gateway0", "g0.worker0"} <= set(browser.text("#actors").split())

    ask(browser, "Hello", max_tokens=20)
    browser.wait_for("document.querySelector('.facts').innerText.startsWith('20 tokens')")
    assert browser.text(".said.assistant .text") != "" and "cut off" in browser.text(".facts")
    assert browser.text(".said.user .text") == "Hello"
    browser.wait_for("Number(document.querySelector('.figures b').innerText) > 0")
    browser.wait_for("document.querySelector('.step').hidden === false")

    # The answer takes a second or two, which a busy machine may need to look at the page once.
    browser.run(
        """
        const watch = setInterval(() => {
            const text = document.querySelectorAll('.said.assistant .text')[1];
            if (text === undefined || text.innerText.length < 4) return;
            clearInterval(watch);
            const send = document.querySelector('#send');
            window.seen = send.innerText;
            send.click();
        }, 5)
        """
    )
    ask(browser, "Go on for long", max_tokens=400)
    browser.wait_for("document.querySelectorAll('.facts')[1]?.innerText.includes('stopped')")
    assert browser.run("window.seen") == "Stop" and browser.text("#send") == "Send"
    in_flight = "fetch('/top', {headers: {authorization: 'Bearer ' + key}}).then((a) => a.json())"
    browser.wait_for(f"{in_flight}.then((found) => found.requests.in_flight === 0)")

    ask(browser, "Too much", max_tokens=100_000)
    browser.wait_for("document.querySelector('.said .error') !== null")
    assert "max_tokens" in browser.text(".said .error")
    browser.click("#new")
    assert browser.run("document.querySelector('#log').children.length") == 0
    # A wrong key and a request that cannot be are answers with such a status.
    assert all("status of 40" in each for each in browser.problems), browser.problems


def ask(browser: Browser, text: str, max_tokens: int) -> None:
    browser.run(f"document.querySelector('[name=max_tokens]').value = {max_tokens}")
    browser.run(f"document.querySelector('[name=seed]').value = {endless_seed()}")
    browser.type("#message", text, enter=True)


def endless_seed() -> int:
    """Of an answer of the `sim` device that no end token ends early."""
    return next(
        seed
        for seed in itertools.count()
        if all(sim_token(seed, at, TINY_VOCAB) != TINY_EOS for at in range(512))
    )


@pytest.mark.node
def test_it_goes_on_with_a_new_router(browser: Browser, http_node: HttpNode) -> None:
    browser.open(f"{http_node.http}/")
    browser.run(f"key = '{KEY}'")
    browser.wait_for("document.querySelector('#state').innerText === 'ready'")
    with Client.connect(node=http_node.name) as client:
        (router,) = (each for each in client.status()["actors"] if each["role"] == "router")
    os.kill(router["pid"], signal.SIGKILL)
    title = "[...document.querySelectorAll('.actor')].map((each) => each.title).join()"
    browser.wait_for(
        f"{title}.includes('router: ready') && !{title}.includes('pid {router['pid']}')"
    )
    browser.wait_for("document.querySelector('#state').innerText === 'ready'")
    assert browser.text("#notice") == "" and "↻1" in browser.text("#actors")


@pytest.mark.node
def test_what_a_model_says_is_text(browser: Browser, http_node: HttpNode) -> None:
    said = "<img src=x onerror=alert(1)> **bold** `a<b` ```js\\nlet x;\\n``` rest"
    browser.open(f"{http_node.http}/")
    browser.run(f"setText(byId('log'), `{said.replace('`', chr(92) + '`')}`)")
    assert browser.run("byId('log').querySelector('img')") is None
    shown = browser.run("[...byId('log').children].map((each) => [each.tagName, each.innerText])")
    assert shown == [["STRONG", "bold"], ["CODE", "a<b"], ["PRE", "let x;"]]
    assert "<img src=x" in browser.text("#log")


@pytest.mark.node
@pytest.mark.parametrize(("width", "height"), [(360, 700), (820, 1000), (1280, 800), (1920, 1080)])
def test_nothing_sticks_out(
    browser: Browser, http_node: HttpNode, width: int, height: int
) -> None:  # fmt: skip
    browser.resize(width, height)
    browser.open(f"{http_node.http}/")
    browser.wait_for("document.querySelectorAll('.group').length === 1")
    for view in ("node", "chat"):
        browser.run(f"document.body.dataset.view = '{view}'")
        assert browser.run("document.documentElement.scrollWidth") <= width
        sticking = browser.run(
            "[...document.querySelectorAll('.card *')].filter((each) => each.checkVisibility() && "
            "each.getBoundingClientRect().right > innerWidth + 1).map((each) => each.outerHTML)"
        )
        assert sticking == []
