"""From what a client asked to what a group is given: every value checked and resolved.

The router is the authority: nothing behind it checks a request again.  All
functions raise Refusal, with the numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from albireo.ipc.config import ActorSpec, blocks_for
from albireo.ipc.messages import Submit
from albireo.ipc.params import PRIORITIES, ParameterError, SamplingParams
from albireo.ipc.plan import MAX_BAD_WORD_TOKENS
from albireo.ipc.protocol import Chat, Detokenize, Generate, Tokenize

from .requests import Refusal
from .tenants import Terms

DEFAULT_MAX_TOKENS = 16
MAX_DETOKENIZE_IDS = 262_144
MAX_TOKENIZE_BYTES = 2 * 1024 * 1024
"""The slowest texts, of digits alone, take the tokenizer 2 s a MiB, in which it answers nobody."""
MAX_NAME_CHARS = 256

_SEED_MASK = 2**64 - 1


class RequestLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a request has to fit: the model's vocabulary and context, a group's KV blocks.

    Groups of a GPU find out later how many blocks they have; the longest context fits in any case.
    """

    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    eos_token_ids: tuple[int, ...]

    @classmethod
    def of(cls, spec: ActorSpec) -> RequestLimits:
        return cls(
            vocab_size=spec.model.vocab_size,
            max_model_len=spec.engine.max_model_len,
            block_size=spec.engine.block_size,
            num_blocks=spec.engine.num_blocks,
            eos_token_ids=spec.model.eos_token_ids,
        )


def check_generate(limits: RequestLimits, message: Generate) -> None:
    """Everything about a generate request that can be said before its text is tokenized."""
    if (message.prompt is None) == (message.prompt_ids is None):
        raise Refusal(
            "invalid_request",
            "give exactly one of prompt (text) and prompt_ids (token ids)",
            param="prompt",
        )
    if message.prompt == "":
        raise Refusal("invalid_request", "the prompt is empty", param="prompt")
    if message.prompt_ids is not None:
        check_prompt_ids(limits, message.prompt_ids)
    _check_request(limits, message)


def check_chat(limits: RequestLimits, message: Chat) -> None:
    """Everything about a chat request that can be said before its text is tokenized."""
    if not message.messages:
        raise Refusal("invalid_request", "the conversation has no message", param="messages")
    _check_template(message)
    if message.tools is not None:
        if (fault := message.tools.fault()) is not None:
            raise Refusal("invalid_request", f"tools: {fault}", param="tools")
        if message.tools.bind and message.params.grammar is not None:
            raise Refusal(
                "invalid_request",
                "tools and a grammar cannot both bind the answer: give one, or tools with "
                "choice none",
                param="grammar",
            )
    _check_request(limits, message)


def check_tokenize(message: Tokenize) -> None:
    if (message.text is None) == (message.messages is None):
        raise Refusal("invalid_request", "give exactly one of text and messages", param="text")
    _check_name("tenant", message.tenant)
    if message.messages == []:
        raise Refusal("invalid_request", "the conversation has no message", param="messages")
    _check_template(message)
    if message.text is not None:
        what, param, size = "text", "text", len(message.text.encode())
    else:
        what, param = "conversation", "messages"
        size = len(msgspec.msgpack.encode(message.messages))
    if size > MAX_TOKENIZE_BYTES:
        raise Refusal(
            "invalid_request",
            f"the {what} has {size} bytes; at most {MAX_TOKENIZE_BYTES} are tokenized at once: "
            "split it",
            param=param,
        )


def _check_template(message: Chat | Tokenize) -> None:
    if (fault := message.template.fault()) is not None:
        raise Refusal("invalid_request", fault, param="template")


def check_detokenize(limits: RequestLimits, message: Detokenize) -> None:
    token_ids = message.token_ids
    _check_name("tenant", message.tenant)
    if len(token_ids) > MAX_DETOKENIZE_IDS:
        raise Refusal(
            "invalid_request",
            f"{len(token_ids)} token ids are too many at once; at most {MAX_DETOKENIZE_IDS} "
            "are allowed: split them",
            param="token_ids",
        )
    _check_range(limits, token_ids, "token_ids")


def check_params(limits: RequestLimits, params: SamplingParams) -> None:
    """Checks the values that do not depend on the prompt."""
    try:
        params.validate()
    except ParameterError as error:
        raise Refusal("invalid_request", str(error), param=error.param) from None
    _check_range(limits, params.stop_token_ids, "stop_token_ids")
    _check_range(limits, tuple(params.logit_bias), "logit_bias")
    _check_range(limits, params.allowed_token_ids or (), "allowed_token_ids")


def check_prompt_ids(limits: RequestLimits, prompt_ids: list[int]) -> None:
    """Checks that a prompt has ids, that they exist, and that the context has room for more."""
    count = len(prompt_ids)
    if not count:
        raise Refusal("invalid_request", "the prompt is empty", param="prompt_ids")
    over = count + 1 - limits.max_model_len
    if over > 0:
        raise Refusal(
            "too_long",
            f"the prompt has {count} tokens; the context holds {limits.max_model_len}, and 1 at "
            f"least must be left to generate: shorten the prompt by {over} tokens or more",
            param="prompt",
        )
    blocks = blocks_for(count + 1, limits.block_size)
    if blocks > limits.num_blocks:
        raise Refusal(
            "too_long",
            f"the prompt's {count} tokens and 1 new one need {blocks} KV blocks of "
            f"{limits.block_size} tokens; a group has {limits.num_blocks}: shorten the prompt",
            param="prompt",
        )
    _check_range(limits, prompt_ids, "prompt_ids")


def for_choice(first: Submit, request: int, choice: int, arrived_s: float) -> Submit:
    """What a group is given for the i-th answer: its own random stream, the prompt scored once."""
    return msgspec.structs.replace(
        first,
        request=request,
        arrived_s=arrived_s,
        seed=_signed(first.seed + choice),
        prompt_logprobs=-1 if choice else first.prompt_logprobs,
    )


def resolve(
    limits: RequestLimits,
    prompt_ids: list[int],
    bad_words: tuple[tuple[int, ...], ...],
    asked: Generate | Chat,
    terms: Terms,
    grammar: str,
    draw_seed: Callable[[], int],
) -> Submit:
    """The message for a group, but for its number: see for_choice.

    prompt_ids, asked: checked by the functions above.
    bad_words: token ids of params.bad_words.  Raises Refusal for one with too many.
    terms: for whom it is.
    grammar: params.grammar, compiled.
    draw_seed: 64 bits, for a request without a seed.
    """
    params = asked.params
    _check_bad_words(bad_words)
    max_tokens = _resolve_max_tokens(limits, len(prompt_ids), params, isinstance(asked, Chat))
    stop_token_ids = params.stop_token_ids
    if not params.ignore_eos:
        stop_token_ids = tuple(dict.fromkeys((*stop_token_ids, *limits.eos_token_ids)))
    return Submit(
        request=0,
        prompt_ids=prompt_ids,
        max_tokens=max_tokens,
        min_tokens=params.min_tokens,
        temperature=params.temperature,
        top_k=params.top_k if params.top_k < limits.vocab_size else 0,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=_signed(draw_seed() if params.seed is None else params.seed),
        stop=params.stop,
        stop_token_ids=stop_token_ids,
        include_stop=params.include_stop_str_in_output,
        skip_special_tokens=params.skip_special_tokens,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        allowed_token_ids=params.allowed_token_ids or (),
        bad_words=bad_words,
        logprobs=-1 if params.logprobs is None else params.logprobs,
        prompt_logprobs=-1 if params.prompt_logprobs is None else params.prompt_logprobs,
        priority=asked.priority,
        tenant=terms.tenant,
        weight=terms.weight,
        cache_salt=terms.cache_salt,
        grammar=grammar,
    )


def _check_request(limits: RequestLimits, message: Generate | Chat) -> None:
    check_params(limits, message.params)
    low, high = PRIORITIES
    if not low <= message.priority <= high:
        raise Refusal(
            "invalid_request",
            f"priority must be between {low} and {high}, not {message.priority}",
            param="priority",
        )
    _check_name("tenant", message.tenant)
    _check_name("cache_salt", message.cache_salt)


def _check_name(field: str, value: str) -> None:
    if len(value) > MAX_NAME_CHARS:
        raise Refusal(
            "invalid_request",
            f"{field} may have {MAX_NAME_CHARS} characters, not {len(value)}",
            param=field,
        )


def _check_bad_words(words: tuple[tuple[int, ...], ...]) -> None:
    longest = max(map(len, words), default=0)
    if longest > MAX_BAD_WORD_TOKENS:
        raise Refusal(
            "invalid_request",
            f"a bad word has {longest} tokens; {MAX_BAD_WORD_TOKENS} are the limit: ban a shorter "
            "part of it",
            param="bad_words",
        )


def _resolve_max_tokens(
    limits: RequestLimits, prompt_tokens: int, params: SamplingParams, chat: bool
) -> int:
    """What was asked if it fits, else a Refusal; what was not asked is cut to fit."""
    kv_tokens = limits.num_blocks * limits.block_size
    if params.max_tokens is None:
        left = min(limits.max_model_len, kv_tokens) - prompt_tokens
        max_tokens = left if chat else min(DEFAULT_MAX_TOKENS, left)
        if params.min_tokens > max_tokens:
            raise Refusal(
                "invalid_request",
                f"min_tokens is {params.min_tokens}, but max_tokens, which is not given, "
                f"is {max_tokens} here: give max_tokens, or a smaller min_tokens",
                param="min_tokens",
            )
        return max_tokens
    total = prompt_tokens + params.max_tokens
    if total > limits.max_model_len:
        raise Refusal(
            "too_long",
            f"{prompt_tokens} prompt tokens + max_tokens {params.max_tokens} = {total}; the "
            f"context holds {limits.max_model_len}: max_tokens can be at most "
            f"{limits.max_model_len - prompt_tokens} for this prompt",
            param="max_tokens",
        )
    blocks = blocks_for(total, limits.block_size)
    if blocks > limits.num_blocks:
        raise Refusal(
            "too_long",
            f"{prompt_tokens} prompt tokens + max_tokens {params.max_tokens} = {total} need "
            f"{blocks} KV blocks of {limits.block_size} tokens; a group has "
            f"{limits.num_blocks}: max_tokens can be at most {kv_tokens - prompt_tokens} "
            "for this prompt",
            param="max_tokens",
        )
    return params.max_tokens


def _check_range(limits: RequestLimits, token_ids: list[int] | tuple[int, ...], param: str) -> None:
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < limits.vocab_size):
        return
    place, token = next(
        (place, token)
        for place, token in enumerate(token_ids)
        if not 0 <= token < limits.vocab_size
    )
    raise Refusal(
        "invalid_request",
        f"{param}[{place}] is {token}; token ids of this model are 0 to {limits.vocab_size - 1}",
        param=param,
    )


def _signed(seed: int) -> int:
    """64 bits as the signed number that has them."""
    seed &= _SEED_MASK
    return seed - 2**64 if seed >= 2**63 else seed
