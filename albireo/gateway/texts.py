"""POST /tokenize and /detokenize."""

from __future__ import annotations

import msgspec

from .answering import check_model
from .answers import Detokenized, Tokenized
from .conversation import chat_messages, template_options
from .decode import decode
from .errors import invalid
from .http import Request
from .link import NodeLink
from .requests import DetokenizeRequest, TokenizeRequest


async def tokenize(request: Request, link: NodeLink) -> None:
    ask = decode(TokenizeRequest, await request.body())
    check_model(link, ask.model)
    if (ask.prompt is None) == (ask.messages is None):
        raise invalid("give exactly one of prompt and messages", "prompt")
    if ask.prompt is not None:
        tokens = await link.tokenize(
            ask.prompt, request.tenant, add_special_tokens=ask.add_special_tokens is not False
        )
    else:
        assert ask.messages is not None
        if ask.add_special_tokens:
            raise invalid(
                "a conversation has the special tokens of its chat template and no others",
                "add_special_tokens",
            )
        tokens = await link.tokenize(
            chat_messages(ask.messages), request.tenant, template=template_options(ask)
        )
    answer = Tokenized(count=len(tokens), max_model_len=link.welcome.max_model_len, tokens=tokens)
    await request.answer(200, msgspec.json.encode(answer))


async def detokenize(request: Request, link: NodeLink) -> None:
    ask = decode(DetokenizeRequest, await request.body())
    check_model(link, ask.model)
    text = await link.detokenize(ask.tokens, request.tenant)
    await request.answer(200, msgspec.json.encode(Detokenized(prompt=text)))
