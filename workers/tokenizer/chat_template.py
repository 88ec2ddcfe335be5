"""Chat templates: conversations to text, as transformers does it.

A template is a small program that comes with a model, and what it is run on
comes from strangers.  So it runs in jinja2's immutable sandbox and within
bounds: its output may have `_MAX_OUTPUT_CHARS` characters, and it may take
`_MAX_CPU_SECONDS`.  Whatever goes wrong inside becomes a ChatTemplateError, with
the template's own words where it called raise_exception.
"""

from __future__ import annotations

import json
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from albireo.ipc.template import PLAIN, TemplateOptions

from .errors import TextModelError

_MAX_OUTPUT_CHARS = 32 * 1024 * 1024
_MAX_CPU_SECONDS = 2.0


class ChatTemplateError(TextModelError):
    """The conversation does not suit the template."""


class _Refusal(jinja2.TemplateError):
    """The template has called raise_exception."""


class _TimeIsUp(BaseException):
    """Not an Exception: nothing inside the template may catch it."""


class ChatTemplate:
    """A compiled template.

    named_tokens: what the template may call by name ("bos_token", ...).
    takes_tools: whether it writes the tools that render() is given.
    Raises TextModelError when the source is not a template.
    """

    def __init__(self, source: str, named_tokens: Mapping[str, Any]) -> None:
        self._named_tokens = dict(named_tokens)
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            # Phi-4-mini's has the word, but looks for them in messages.
            variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise TextModelError(
                f"the chat template has an error in line {error.lineno}: {error.message}"
            ) from error
        self.takes_tools = "tools" in variables

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: TemplateOptions = PLAIN,
    ) -> str:
        """The conversation as text, ready for the assistant's answer.

        Raises ChatTemplateError.
        """
        said = [dict(message) for message in messages]
        mark = ""
        if options.continue_final_message and said:
            mark = f"{secrets.token_hex(16)} "
            said[-1]["content"] = (said[-1].get("content") or "") + mark
        text = self._rendered(said, tools, options)
        return _up_to(mark, text) if mark else text

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        options: TemplateOptions,
    ) -> str:
        pieces: list[str] = []
        size = 0
        try:
            with _time_limit(_MAX_CPU_SECONDS):
                for piece in self._template.generate(
                    {
                        **self._named_tokens,
                        **options.variables,
                        "messages": messages,
                        "tools": None if tools is None else [dict(tool) for tool in tools],
                        "documents": None,
                        "add_generation_prompt": options.begins_answer,
                    }
                ):
                    pieces.append(piece)
                    size += len(piece)
                    if size > _MAX_OUTPUT_CHARS:
                        raise ChatTemplateError(
                            f"the conversation is too long: as text it has more than "
                            f"{_MAX_OUTPUT_CHARS} characters"
                        )
        except _TimeIsUp:
            raise ChatTemplateError(
                f"the chat template took more than {_MAX_CPU_SECONDS:g} s of CPU time "
                "on this conversation"
            ) from None
        except ChatTemplateError:
            raise
        except _Refusal as error:
            raise ChatTemplateError(
                f"the chat template refuses this conversation: {error.message}"
            ) from error
        except Exception as error:
            raise ChatTemplateError(
                f"the chat template failed on this conversation: {type(error).__name__}: {error}"
            ) from error
        return "".join(pieces)


def _up_to(mark: str, text: str) -> str:
    """The text before the mark, which ends with a space, as transformers cuts it: where the
    template takes spaces off a message's end, so does this."""
    place = text.rfind(mark.strip())
    if place < 0:
        raise ChatTemplateError(
            "the chat template leaves out the text of the last message, which "
            "continue_final_message goes on with"
        )
    kept = text[:place]
    return kept if text.startswith(mark, place) else kept.rstrip()


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - the name and form that jinja2 asks for

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers sets it up, so that its templates render to the same text."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes for HTML, which a prompt does not want."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@contextmanager
def _time_limit(cpu_seconds: float) -> Iterator[None]:
    """Raises _TimeIsUp in the body once the process has used `cpu_seconds` in user mode.

    CPU time, so that a busy machine fails nobody.  Signals reach the main
    thread only: elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_alarm(_signal: int, _frame: object) -> NoReturn:
        raise _TimeIsUp

    previous = signal.signal(signal.SIGVTALRM, on_alarm)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
