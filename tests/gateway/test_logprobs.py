"""Where tokens lie in a choice's text, of tokenizers that write more than the text has."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer, processors

from albireo.client import Delta, End
from albireo.gateway.link import Ask
from albireo.gateway.logprobs import EchoOffsets
from albireo.ipc.protocol import Logprobs, TokenLogprob
from albireo.workers.detokenizer.stream import stream_factory
from albireo.workers.tokenizer.text_model import TextModel

from ..text.tiny_tokenizers import byte_level, sentencepiece, text_model
from .played import PlayedLink, chunks, post


@cache
def sentencepiece_with_begin() -> Tokenizer:
    tokenizer = Tokenizer.from_str(sentencepiece().to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


class ModelLink(PlayedLink):
    """A node that says `answer`, in the tokens of a real tokenizer."""

    def __init__(self, model: TextModel, answer: str) -> None:
        super().__init__(self._say)
        self._model = model
        self._answer = answer
        self.welcome = msgspec.structs.replace(
            self.welcome,
            strips_first_space=model.strips_first_space,
            special_ids=tuple(model.special_ids),
        )

    async def tokenize(
        self, text: Any, tenant: str, *, add_special_tokens: bool = True
    ) -> list[int]:
        return self._model.encode(text, add_special_tokens)

    async def detokenize(self, ids: list[int], tenant: str) -> str:
        return self._model.decode(ids, False)

    def _rows(self, ids: list[int]) -> list[Logprobs]:
        bytes_of = self._model.bytes_of
        return [Logprobs(TokenLogprob(each, -0.5, 1, bytes_of(each)), []) for each in ids]

    async def _say(
        self, link: PlayedLink, number: int, ask: Ask, on_reply: Callable[[Any], None]
    ) -> None:
        prompt = ask.prompt
        ids = self._model.encode(prompt, True) if isinstance(prompt, str) else prompt or []
        scores = self._rows(ids[1:])
        said = self._model.encode(self._answer, False)
        text = stream_factory(self._model, 0)(ask.params.skip_special_tokens)
        for place, token in enumerate(said):
            new = text.add(token)
            last = place == len(said) - 1
            on_reply(
                Delta(
                    number, place, [token], new + text.flush() if last else new,
                    End("length", None, len(ids), len(said)) if last else None, 0,
                    self._rows([token]), None if place else scores,
                )
            )  # fmt: skip


def spans(choice: dict[str, Any]) -> list[tuple[str, str]]:
    """Every token with the text that its offset, and that of the next one, give it."""
    text, found = choice["text"], choice["logprobs"]
    ends = [*found["text_offset"][1:], len(text)]
    pieces = [text[a:b] for a, b in zip(found["text_offset"], ends, strict=True)]
    assert "".join(pieces) == text
    return list(zip(found["tokens"], pieces, strict=True))


def ask(link: ModelLink, stream: bool, **body: Any) -> dict[str, Any]:
    """The one choice of an answer."""
    body |= {"logprobs": 1, "max_tokens": 50, "stream": stream}
    answer = post("/v1/completions", body, link)
    assert answer.status_code == 200, answer.text
    if not stream:
        whole: dict[str, Any] = answer.json()["choices"][0]
        return whole
    choices = [choice for each in chunks(answer) for choice in each["choices"]]
    logprobs: dict[str, list[Any]] = {"tokens": [], "text_offset": []}
    for choice in choices:
        for field, values in logprobs.items():
            values += (choice["logprobs"] or {}).get(field, [])
    return {"text": "".join(each["text"] for each in choices), "logprobs": logprobs}


@pytest.mark.parametrize("stream", [False, True])
def test_the_space_that_a_text_does_not_begin_with_is_not_counted(stream: bool) -> None:
    link = ModelLink(text_model(sentencepiece()), "The quick brown fox")
    choice = ask(link, stream, prompt="a")
    assert choice["text"] == "The quick brown fox"
    found = spans(choice)
    assert found[0][0].startswith(" ")
    assert [span for _, span in found] == [found[0][0][1:], *(token for token, _ in found[1:])]


@pytest.mark.parametrize("answer", ["  two spaces", " ", "一 a", "a é🙃 b"])
@pytest.mark.parametrize("stream", [False, True])
def test_whole_tokens_have_their_text_wherever_spaces_are(answer: str, stream: bool) -> None:
    for model in (text_model(sentencepiece()), text_model(byte_level())):
        choice = ask(ModelLink(model, answer), stream, prompt="a")
        assert choice["text"] == answer
        found = spans(choice)
        stripped = found[0][0][model.strips_first_space :]
        assert found[0][1] in (stripped, "")
        assert all(s == t for t, s in found[1:] if not t.startswith("bytes:"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("tokenizer", [byte_level, sentencepiece_with_begin, sentencepiece])
def test_echo_has_the_offsets_of_its_own_text(
    tokenizer: Callable[[], Tokenizer], as_ids: bool, stream: bool
) -> None:
    model = text_model(tokenizer())
    prompt = "The quick dog, 世"
    ids = model.encode(prompt, True)
    choice = ask(ModelLink(model, "brown fox"), stream, prompt=ids if as_ids else prompt, echo=True)
    echoed = model.decode(ids, False) if as_ids else prompt
    assert choice["text"] == echoed + "brown fox"
    found = spans(choice)
    assert choice["logprobs"]["text_offset"][len(ids)] == len(echoed)
    begin = model.decode(ids[:1], False)
    assert found[0] == (begin, begin if echoed.startswith(begin) else "")
    for place, (token, span) in enumerate(found[1:], 1):
        if not token.startswith("bytes:"):
            # Neither the text nor the answer behind it begins with the space of its first token.
            begins = place == len(ids) or (place == 1 and not found[0][1])
            assert span == (token.removeprefix(" ") if begins else token)


def test_a_first_token_may_have_one_space_more_than_the_echo() -> None:
    offsets = EchoOffsets("  a b", b"<s>")
    tokens = [TokenLogprob(5, -0.5, 1, text) for text in (b"   a", b" b", b"</s>")]
    assert [offsets.next(token) for token in tokens] == [0, 3, 5]


@pytest.mark.parametrize("hides", [True, False])
@pytest.mark.parametrize("stream", [False, True])
def test_tokens_that_the_text_leaves_out_take_no_place_in_it(stream: bool, hides: bool) -> None:
    model = text_model(byte_level())
    special = model.bytes_of(min(model.special_ids)).decode()
    link = ModelLink(model, f"{special}The quick{special} fox")
    choice = ask(link, stream, prompt="a", skip_special_tokens=hides)
    shown = "" if hides else special
    assert choice["text"] == f"{shown}The quick{shown} fox"
    assert sum(token == special for token, _ in spans(choice)) == 2
    assert all(span == (shown if token == special else token) for token, span in spans(choice))


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_may_begin_within_a_character(stream: bool) -> None:
    model = text_model(byte_level())
    prompt = "\U0001f600\U0001f600 hello"
    ids = model.encode(prompt, False)
    first = model.bytes_of(ids[0])
    assert len(first) < 4  # or this is of no use
    choice = ask(ModelLink(model, "brown fox"), stream, prompt=ids, echo=True)
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert tokens[0] == "bytes:" + "".join(f"\\x{byte:02x}" for byte in first)
    assert choice["text"] == prompt + "brown fox"
    expected, so_far = [], b""
    for token in ids:
        expected.append(len(so_far.decode(errors="ignore")))
        so_far += model.bytes_of(token)
    assert offsets[: len(ids)] == expected
    assert offsets[len(ids)] == len(prompt)
