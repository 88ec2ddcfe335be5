"""POST /v1/completions."""

from __future__ import annotations

import time
from functools import partial

import msgspec

from albireo.ipc.protocol import Logprobs

from .answering import asked, check_model, usage_of
from .answers import Completion, CompletionChoice
from .decode import decode
from .errors import invalid
from .events import CompletionEvents, stream, without_tokens
from .formats import grammar_name
from .http import Request
from .inbox import Piece
from .link import Ask, NodeLink
from .logprobs import (
    CompletionLogprobs,
    Offsets,
    completion_logprobs,
    echo_logprobs,
    joined,
    prompt_logprobs,
)
from .requests import CompletionRequest, StreamOptions
from .sampling import completion_params, scores_only

MAX_PROMPTS = 1024

_Prompt = str | list[int]


class _Echo(msgspec.Struct, frozen=True):
    """texts: of the prompts.  first_tokens: of each, where log-probabilities are asked for."""

    texts: list[str]
    first_tokens: list[str]

    def text(self, prompt: int) -> str:
        """Ahead of the answers to the prompt of that number."""
        return self.texts[prompt] if self.texts else ""


async def completions(request: Request, link: NodeLink) -> None:
    """Answers one request.  Raises HttpError, AlbireoError, ClientGone."""
    ask = decode(CompletionRequest, await request.body())
    check_model(link, ask.model)
    request.adopt_id(ask.request_id)
    params = completion_params(ask, link.welcome.sampling_defaults)
    request.grammar = grammar_name(ask)
    prompts = _prompts(ask)
    echo = await _echo(link, ask, prompts, request.tenant)
    prompts = await _tokenized(link, ask, prompts, request.tenant)
    asks = [
        Ask(
            prompt=prompt, params=params, priority=ask.priority or 0, tenant=request.tenant,
            cache_salt=ask.cache_salt or "",
        )
        for prompt in prompts
    ]  # fmt: skip
    async with asked(request, link, asks, bool(ask.stream)) as inbox:
        if ask.stream:
            options = ask.stream_options or StreamOptions()
            events = CompletionEvents(
                request.id, link.welcome.model, params.n, options, echo.texts, echo.first_tokens,
                scores_only(ask), partial(_offsets, link, ask),
            )  # fmt: skip
            await stream(request, inbox, events)
            return
        await inbox.wait_for_all()
        answer = _answer(request, link, ask, echo, params.n, inbox.take())
    await request.answer(200, msgspec.json.encode(answer))


def _prompts(ask: CompletionRequest) -> list[_Prompt]:
    """The prompts in their four forms as a list.  Raises HttpError."""
    given = ask.prompt
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid("the prompt is an empty list", "prompt")
    kinds = {type(each) for each in given}
    if len(kinds) > 1:
        raise invalid(
            "prompt is a text, a list of texts, a list of token ids, or a list of such lists; "
            "not a mixture of them",
            "prompt",
        )
    if kinds == {int}:
        return [given]  # type: ignore[list-item]
    if len(given) > MAX_PROMPTS:
        raise invalid(f"{len(given)} prompts are too many; at most {MAX_PROMPTS}", "prompt")
    return given  # type: ignore[return-value]


async def _tokenized(
    link: NodeLink, ask: CompletionRequest, prompts: list[_Prompt], tenant: str
) -> list[_Prompt]:
    """Ids instead of texts, where the node would add special tokens that are not wanted."""
    if ask.add_special_tokens is not False:
        return prompts
    return [
        await link.tokenize(each, tenant, add_special_tokens=False)
        if isinstance(each, str)
        else each
        for each in prompts
    ]


async def _echo(
    link: NodeLink, ask: CompletionRequest, prompts: list[_Prompt], tenant: str
) -> _Echo:
    """What the answers begin with."""
    if not ask.echo:
        return _Echo([], [])
    texts = [
        each if isinstance(each, str) else await link.detokenize(each, tenant) for each in prompts
    ]
    if ask.logprobs is None:
        return _Echo(texts, [])
    first_tokens = []
    for each in prompts:
        if isinstance(each, str):
            each = await link.tokenize(
                each, tenant, add_special_tokens=ask.add_special_tokens is not False
            )
        first_tokens.append(await link.detokenize(each[:1], tenant))
    return _Echo(texts, first_tokens)


def _answer(
    request: Request, link: NodeLink, ask: CompletionRequest, echo: _Echo, n: int,
    pieces: dict[int, Piece],
) -> Completion:  # fmt: skip
    ends = []
    choices = []
    rows = {c // n: p.prompt_logprobs for c, p in pieces.items() if p.prompt_logprobs is not None}
    for number in sorted(pieces):
        piece = pieces[number]
        if scores_only(ask):
            piece = without_tokens(piece)
        end = piece.end
        assert end is not None
        ends.append((number, end))
        prompt = number // n
        scored = None if ask.prompt_logprobs is None else prompt_logprobs(rows.get(prompt, []))
        choices.append(
            CompletionChoice(
                index=number,
                text=echo.text(prompt) + piece.text,
                logprobs=_logprobs(link, ask, piece, echo, prompt, rows),
                finish_reason=end.finish_reason,
                stop_reason=end.stop_reason,
                prompt_logprobs=scored,
            )
        )
    return Completion(
        id=f"cmpl-{request.id}",
        created=int(time.time()),
        model=link.welcome.model,
        choices=choices,
        usage=usage_of(ends, n),
    )


def _logprobs(
    link: NodeLink, ask: CompletionRequest, piece: Piece, echo: _Echo, prompt: int,
    rows: dict[int, list[Logprobs]],
) -> CompletionLogprobs | None:  # fmt: skip
    if ask.logprobs is None:
        return None
    text = echo.text(prompt)
    parts = []
    if echo.first_tokens:
        first = echo.first_tokens[prompt]
        parts.append(echo_logprobs(rows.get(prompt, []), text, first))
    parts.append(completion_logprobs(piece.logprobs or [], _offsets(link, ask, len(text))))
    return joined(parts)


def _offsets(link: NodeLink, ask: CompletionRequest, at: int) -> Offsets:
    """Of an answer whose text begins at `at`."""
    hidden = frozenset(() if ask.skip_special_tokens is False else link.welcome.special_ids)
    return Offsets(at, link.welcome.strips_first_space, hidden)
