"""Chromium without a screen, for pictures of the page and for its tests.

It is driven with the DevTools protocol over two pipes: JSON, each message ended
by a zero byte.  No port is opened and no library is needed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_TIMEOUT_S = 40.0


class BrowserError(RuntimeError):
    """What was asked for did not happen in time, or the page's own script failed."""


def find_browser() -> str | None:
    """The command of a Chromium that is installed ($ALBIREO_TEST_BROWSER goes first)."""
    named = os.environ.get("ALBIREO_TEST_BROWSER")
    return next(filter(None, map(shutil.which, [named] if named else NAMES)), None)


class Browser:
    """One page of a browser of its own, without a past: `with Browser() as browser:`.

    problems: what the page's console said as warning or error, violations of its
    policy and exceptions among them.
    """

    def __init__(self, width: int = 1280, height: int = 800) -> None:
        command = find_browser()
        if command is None:
            raise BrowserError(f"no Chromium is installed (looked for {', '.join(NAMES)})")
        self.problems: list[str] = []
        self._home = tempfile.TemporaryDirectory(
            prefix="albireo-browser-", ignore_cleanup_errors=True
        )
        to_read, self._out = os.pipe()
        self._in, to_write = os.pipe()
        flags = [
            "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={self._home.name}",
            "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-extensions", "--password-store=basic", f"--window-size={width},{height}",
            *(["--no-sandbox"] if os.getuid() == 0 else []), "about:blank",
        ]  # fmt: skip
        # The browser reads descriptor 3 and writes 4.  (sh knows one-digit descriptors alone.)
        script = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, command, *flags],
            pass_fds=(to_read, to_write), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._received = b""
        self._number = 0
        self._session: str | None = None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(each["targetId"] for each in targets if each["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(BrowserError, OSError):
            self._session = None
            self.call("Browser.close")
        os.close(self._out)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        self._home.cleanup()

    def resize(self, width: int, height: int, scale: float = 1.0, mobile: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=scale, mobile=mobile)  # fmt: skip

    def prefer(self, scheme: str) -> None:
        """`scheme`: "light" or "dark"."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page.  Raises BrowserError when it throws."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True,
                          awaitPromise=True, userGesture=True)  # fmt: skip
        if "exceptionDetails" in found:
            raise BrowserError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def text(self, selector: str) -> str:
        return str(self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, selector: str, text: str, enter: bool = False) -> None:
        """As a user types it."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)
        if enter:
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r",
                          windowsVirtualKeyCode=13)  # fmt: skip

    def wait_for(self, condition: str, timeout_s: float = _TIMEOUT_S) -> None:
        """Until an expression is true.  Raises BrowserError."""
        deadline = time.monotonic() + timeout_s
        while not self.run(condition):
            if time.monotonic() > deadline:
                raise BrowserError(f"not within {timeout_s:g} s: {condition}; {self.problems}")
            time.sleep(0.03)

    def screenshot(self, path: Path | str) -> None:
        """PNG of the window."""
        found = self.call("Page.captureScreenshot", format="png")
        Path(path).write_bytes(base64.b64decode(found["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol; events that come meanwhile are looked at."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._receive(method)
            if found.get("id") == self._number:
                if "error" in found:
                    raise BrowserError(f"{method}: {found['error']['message']}")
                return dict(found["result"])
            self._note(found)

    def _receive(self, method: str) -> dict[str, Any]:
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._in], [], [], _TIMEOUT_S)
            data = os.read(self._in, 1 << 20) if ready else b""
            if not data:
                raise BrowserError(f"{method}: the browser does not answer")
            self._received += data
        message, _, self._received = self._received.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"])[:500])
        elif event.get("method") == "Log.entryAdded":
            entry = params["entry"]
            if entry["level"] in ("warning", "error"):
                self.problems.append(f"{entry['text']} {entry.get('url', '')}")
        elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in (
            "error", "warning",
        ):  # fmt: skip
            self.problems.append(str([each.get("value") for each in params["args"]]))
