"""GET / and GET /top: a page with the picture of the node and a chat, and what it draws.

The page is one file without a single external part: page.html with page.css and
the scripts put into it.  Its Content-Security-Policy names both by their hashes,
so nothing else can run in it, whatever a model says; it asks this origin alone.
It is served without a key: what it shows and does asks for one.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib.resources import files

import msgspec

from .http import Request
from .link import NodeLink

_HTML = (b"content-type", b"text/html; charset=utf-8")
_SCRIPTS = ("page.js", "page_node.js", "page_chat.js")
_JSON_HEADERS = ((b"cache-control", b"no-store"),)


async def page(request: Request, link: NodeLink) -> None:
    body, headers = _page()
    await request.answer(200, body, headers, content_type=_HTML)


async def top(request: Request, link: NodeLink) -> None:
    """What `albireo top --json` prints, at most half a second old.  Raises AlbireoError."""
    body = msgspec.json.encode(await link.watch.see())
    await request.answer(200, body, _JSON_HEADERS)


@functools.cache
def _page() -> tuple[bytes, tuple[tuple[bytes, bytes], ...]]:
    """The page, and the headers that confine it."""
    style = _part("page.css")
    script = '"use strict";\n' + "\n".join(_part(name) for name in _SCRIPTS)
    text = _part("page.html").replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(script)}",
            f"style-src {_hash(style)}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        )
    )
    return text.encode(), (
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"cache-control", b"no-cache"),
    )


def _hash(text: str) -> str:
    """Of an element's text, as a policy names it."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")
