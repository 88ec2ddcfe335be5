"""From a Grammar to the text that matchers are made of, and whether it can be served.

What comes from strangers is compiled in a child process first, with a limit on its time and
memory: fuel bounds llguidance's work by count, the child bounds it whatever happens.  What has
passed is remembered, so the same schema again costs a look-up.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import select
import signal
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from albireo.ipc.grammars import MAX_GRAMMAR_BYTES, Grammar
from albireo.ipc.tools import Tools
from albireo.workers.tokenizer.errors import TextModelError

from .json_options import JSON_OPTIONS
from .tools import tools_grammar
from .vocabulary import Vocabulary

COMPILE_MS = 250
"""CPU time of compiling: a worker does it again, and what runs beside it waits as long."""
MASK_MS = 50
"""CPU time of the longest mask on a walk of WALK_TOKENS tokens that the grammar allows."""
WALK_TOKENS = 32
COMPILE_CPU_S = 1
COMPILE_TIMEOUT_S = 5.0
COMPILE_BYTES = 1 << 30
"""Address space that compiling may add."""
_MAX_KNOWN = 256
_MAX_ERROR_BYTES = 600
_OUT_OF_MEMORY = 3
_ONE_OF = (
    "Enable 'coerce_one_of' option",
    'Use anyOf, or put "x-guidance": {"coerce_one_of": true} at the schema\'s top,',
)
"""What the compiler advises, and how that is done here."""
_DELETE = "\x7f"  # JSON may have it in a text, Lark may not
_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)


_T = TypeVar("_T")


class GrammarError(TextModelError):
    """A grammar that cannot be served; the text is for the user."""

    def __init__(self, message: str, param: str = "grammar") -> None:
        super().__init__(message, param)


class GrammarCompiler:
    """Of one model; used by the tokenizer process, which has no other thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._known: OrderedDict[str, None] = OrderedDict()

    def compile(self, grammar: Grammar) -> str:
        """Raises GrammarError with the cause."""
        return self.check(grammar_text(grammar))

    def compile_tools(self, tools: Tools, style: str) -> str:
        """The same for tools that bind; style: see tools.py."""
        return self.check(tools_grammar(tools, style), "tools")

    def check(self, text: str, param: str = "grammar") -> str:
        """`text`, once it is certain that matchers can be made of it.  Raises GrammarError."""
        if text in self._known:
            self._known.move_to_end(text)
            return text
        size = len(text.encode())
        if size > MAX_GRAMMAR_BYTES:
            raise GrammarError(
                f"the grammar has {size} bytes; {MAX_GRAMMAR_BYTES} are the limit: ask for less "
                "structure at once",
                param,
            )
        fault = _try_apart(self._vocabulary, text)
        if fault:
            raise GrammarError(f"the {param} cannot be compiled: {fault}", param)
        self._known[text] = None
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        return text


def grammar_text(grammar: Grammar) -> str:
    """What matchers are made of.  Raises GrammarError for what is no JSON or no GBNF."""
    if grammar.json_schema is not None:
        return _schema_text(grammar.json_schema)
    if grammar.json_object:
        return _schema_text({"type": "object"})
    if grammar.regex is not None:
        return str(LLMatcher.grammar_from_regex(grammar.regex))
    if grammar.choice:
        options = " | ".join(json.dumps(text, ensure_ascii=False) for text in grammar.choice)
        return f"start: {options}".replace(_DELETE, r"\u007f")
    assert grammar.lark is not None
    return _lark_text(grammar.lark)


def _schema_text(schema: dict[str, Any] | str) -> str:
    """JSON_OPTIONS win over what the schema itself says of white space."""
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        if not isinstance(schema, dict | bool):
            raise ValueError(f"a schema is a map, not {type(schema).__name__}")
        text = json.dumps(schema)
        return str(LLMatcher.grammar_from_json_schema(text, overrides=cast("Any", JSON_OPTIONS)))
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema is not valid: {error}"[:_MAX_ERROR_BYTES]) from None


def _lark_text(text: str) -> str:
    if not _GBNF_RULE.search(text):
        return str(LLMatcher.grammar_from_lark(text))
    try:
        return str(gbnf_to_lark(text))
    except Exception as error:  # the converter raises whatever its parser does
        raise GrammarError(f"the grammar is not valid GBNF: {error}"[:_MAX_ERROR_BYTES]) from None


def _try_apart(vocabulary: Vocabulary, text: str) -> str:
    """Compiles in a child; "" when that went well, else the cause."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _compile_and_exit(vocabulary, text, write_end)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as answer:
        in_time, _, _ = select.select([answer], [], [], COMPILE_TIMEOUT_S)
        said = answer.read(_MAX_ERROR_BYTES) if in_time else b""
    if not in_time:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not in_time:
        return f"it took more than {COMPILE_TIMEOUT_S:g} s"
    if os.waitstatus_to_exitcode(status) == 0:
        return said.decode("utf-8", "replace").strip()
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if ended_by in (signal.SIGXCPU, signal.SIGKILL):
        return f"it took more than {COMPILE_CPU_S} s of CPU time"
    return f"it needs more than {COMPILE_BYTES >> 20} MiB of memory, or is nested too deeply"


def _compile_and_exit(vocabulary: Vocabulary, text: str, answer: int) -> NoReturn:
    """The child: says what is wrong, or nothing; whatever ends it ends it alone."""
    status = _OUT_OF_MEMORY
    try:
        # A Rust panic prints to it; the parent says what is to be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with open("/proc/self/statm", "rb") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + COMPILE_BYTES, used + COMPILE_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (COMPILE_CPU_S, COMPILE_CPU_S + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        os.write(answer, _try(vocabulary, text).encode()[:_MAX_ERROR_BYTES])
        status = 0
    finally:
        os._exit(status)


def _try(vocabulary: Vocabulary, text: str) -> str:
    """Compiles, and walks a little way: "" when that takes no longer than it may."""
    matcher, took_ms = _timed(lambda: vocabulary.matcher(text))
    if took_ms > COMPILE_MS and not matcher.is_error():
        return f"it takes {took_ms:.0f} ms to compile; {COMPILE_MS} are the limit"
    pick = random.Random(0)
    for _ in range(WALK_TOKENS):
        if matcher.is_error() or matcher.is_stopped():
            break
        mask, took_ms = _timed(matcher.compute_bitmask)
        if took_ms > MASK_MS:
            return (
                f"finding the tokens that it allows takes {took_ms:.0f} ms; {MASK_MS} are the "
                "limit: make its repetitions shorter"
            )
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
        matcher.consume_token(int(pick.choice(allowed)))
    fault = str(matcher.get_error()).replace("<non-verbose/>", "").replace(*_ONE_OF).strip()
    return "no text that ends matches it" if fault == "NoExtensionBias" else fault


def _timed(work: Callable[[], _T]) -> tuple[_T, float]:
    """What it returns, and the CPU time that it took, in ms."""
    begun = time.process_time()
    found = work()
    return found, (time.process_time() - begun) * 1000
