"""The tokenizer process: text and conversations to token ids for the router, and back.

A Spoke of the router's Hub.  It keeps nothing between requests, and whatever
one request does to it, the answer is a TextFailed and the next request is
served: only a broken link ends the process.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec
import zmq

from albireo.ipc.actor import Actor
from albireo.ipc.grammars import Grammar
from albireo.ipc.link import MessageTooLarge, Spoke
from albireo.ipc.messages import (
    Decoded,
    DecodeIds,
    EncodeChat,
    Encoded,
    EncodeText,
    Joined,
    TextFailed,
    ToTokenizer,
)
from albireo.ipc.stages import Stage
from albireo.ipc.timeline import NO_STEP, Recorder

from .errors import TextModelError
from .text_model import TextModel

if TYPE_CHECKING:
    from albireo.workers.grammar.compile import GrammarCompiler
    from albireo.workers.grammar.vocabulary import Vocabulary


_LONGEST_S = 60.0
"""What one request may take; the longest texts take 16 s, where nothing else runs."""


def main(
    actor: Actor, fds: Mapping[str, int], text: TextModel, vocabulary: Vocabulary | None = None
) -> None:
    """Serves until the actor is asked to stop.  vocabulary: None where no grammar is served."""
    grammars = None
    if vocabulary is not None:
        from albireo.workers.grammar.compile import GrammarCompiler

        grammars = GrammarCompiler(vocabulary)
    incarnation = actor.spec.incarnation
    router: Spoke[ToTokenizer] = Spoke(
        actor.spec.socket_path("router"), f"tokenizer.{incarnation}", ToTokenizer
    )
    timeline = Recorder.of(fds)
    poller = zmq.Poller()
    poller.register(router.socket, zmq.POLLIN)
    poller.register(actor.stop_fd, zmq.POLLIN)
    poller.register(actor.ping_fd, zmq.POLLIN)
    router.send(Joined("tokenizer", -1, incarnation, os.getpid()))
    actor.ready()
    while not actor.stopping.is_set():
        poller.poll()
        actor.answer_ping()
        for request in router.drain():
            start_ns = time.monotonic_ns()
            with actor.busy(_LONGEST_S):
                reply = answer(text, request, grammars)
            _send(router, reply, request.key)
            timeline.record(Stage.ENCODE, NO_STEP, start_ns, time.monotonic_ns(), 1)
            actor.answer_ping()
            if actor.stopping.is_set():
                break
    router.close()


def _send(router: Spoke[ToTokenizer], reply: msgspec.Struct, key: int) -> None:
    """Sends it; where it is too large for a message, that is said in its place."""
    try:
        router.send(reply)
    except MessageTooLarge as error:
        router.send(TextFailed(key, "invalid_request", f"{error}: split the request"))


def answer(
    text: TextModel, request: ToTokenizer, grammars: GrammarCompiler | None = None
) -> msgspec.Struct:
    """Encoded, Decoded or TextFailed; never an exception."""
    try:
        match request:
            case EncodeText(key, prompt, add_special_tokens, words, grammar, context):
                text.check_length(prompt, context)
                ids = text.encode(prompt, add_special_tokens)
                bound = _compile(grammars, grammar)
                return Encoded(key, ids, text.encode_words(words), bound)
            case EncodeChat(key, messages, words, grammar, tools, context, template):
                ids = text.encode_chat(messages, tools, context, template)
                bound = _compile(grammars, grammar)
                if tools is not None and tools.bind:
                    bound = _compiler(grammars).compile_tools(tools, text.tool_style)
                return Encoded(key, ids, text.encode_words(words), bound)
            case DecodeIds(key, token_ids, skip_special_tokens):
                return Decoded(key, text.decode(token_ids, skip_special_tokens))
    except TextModelError as error:
        return TextFailed(request.key, error.code, str(error), error.param)
    except BaseException as error:  # a panic inside the tokenizers library is no Exception
        logging.exception("request %d has failed", request.key)
        return TextFailed(
            request.key, "internal", f"the tokenizer failed: {type(error).__name__}: {error}"
        )


def _compile(grammars: GrammarCompiler | None, grammar: Grammar | None) -> str:
    """What Submit carries of a grammar.  Raises TextModelError."""
    return "" if grammar is None else _compiler(grammars).compile(grammar)


def _compiler(grammars: GrammarCompiler | None) -> GrammarCompiler:
    if grammars is None:
        raise TextModelError(
            "structured output needs a model with an end token, which this node does not serve: "
            "leave grammar and tools out",
            "grammar",
        )
    return grammars
