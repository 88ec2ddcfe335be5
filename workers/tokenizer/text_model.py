"""A model's text side: text and conversations to token ids, and back.

load_text_model is called once, in the fork server; tokenizer and detokenizer
processes inherit the TextModel by fork, so loading starts no threads.  What is
encoded and decoded is what transformers gives for the same files, with one
exception: decoding never "cleans up" spaces, which would break streaming.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

# Read by the tokenizers library when it is first used: a thread pool would not survive a fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import Tokenizer

from albireo.ipc.protocol import ChatMessage
from albireo.ipc.template import PLAIN, TemplateOptions
from albireo.ipc.tools import Tools

from .chat_template import ChatTemplate
from .errors import TextModelError
from .gguf_tokenizer import read_gguf_text
from .hf_directory import has_tokenizer, read_hf_text
from .longest_token import longest_token, lost_bytes
from .source import TextSource
from .stand_in import stand_in_text
from .token_bytes import bytes_of_piece, token_bytes
from .tool_prompt import as_maps, as_text, described, tool_style

__all__ = ["TextModel", "TextModelError", "load_text_model"]


class TextModel:
    """Tokenizer and chat template of one model.

    vocab_size: ids are 0 .. vocab_size - 1; a model's embedding may have more rows.
    longest_token: most bytes of text that a token stands for, as in longest_token.py.
    special_ids: ids whose text `skip_special_tokens` leaves out.
    eos_token_id: the token that the tokenizer's files call its end token; None = they name none.
    tool_style: how the template teaches tool calls, as in workers/grammar/tools.py.
    token_bytes: the bytes of every id where the tokenizer is byte-level: the
        bytes of a text are those of its tokens, one after the other.  Else None.
    strips_first_space: whether a text lacks the space that its first token begins with,
        as SentencePiece's do: it puts one before every text.
    """

    def __init__(self, source: TextSource, chat_template: str | None = None) -> None:
        self._tokenizer = source.tokenizer
        self._plain: Tokenizer | None = None
        self.vocab_size = source.vocab_size
        self.longest_token = longest_token(source.tokenizer)
        self._lost_bytes = lost_bytes(source.tokenizer)
        self.special_ids = _special_ids(source)
        self.eos_token_id = _eos_token_id(source)
        self.token_bytes = token_bytes(source.tokenizer, source.vocab_size)
        self.strips_first_space = self._strips_first_space()
        template = chat_template or source.chat_template
        self._template = ChatTemplate(template, source.named_tokens) if template else None
        self.tool_style = tool_style(template or "")

    def has_token(self, token: int) -> bool:
        """Whether an id is a token's; padding rows of an embedding are none's."""
        return self._tokenizer.id_to_token(token) is not None

    def bytes_of(self, token: int) -> bytes:
        """A token's own bytes, which may be part of a character.

        Ids without a token, as those beyond the tokenizer's vocabulary, have none.
        """
        if self.token_bytes is not None:
            return self.token_bytes[token] if token < len(self.token_bytes) else b""
        return bytes_of_piece(self._tokenizer.id_to_token(token))

    def _strips_first_space(self) -> bool:
        if self.token_bytes is not None:
            return False
        for token in range(self.vocab_size):
            own = self.bytes_of(token)
            if own.startswith(b" ") and len(own) > 1:
                return self.decode_window([token], False).encode() == own[1:]
        return False

    def check_length(self, text: str, context: int) -> None:
        """Raises TextModelError for a text whose length alone tells that it has too many tokens.

        To tokenize it all the same could take seconds, in which others wait.
        context: tokens that the text and one more have to fit into; 0 = any number.
        """
        if not self.longest_token or not context:
            return
        size = len(text.encode().translate(None, self._lost_bytes))
        over = size - (context - 1) * self.longest_token
        if over > 0:
            raise TextModelError(
                f"the prompt has {size} bytes, which are {-(-size // self.longest_token)} tokens "
                f"at least; the context holds {context}, and 1 at least must be left to generate: "
                f"shorten the prompt by {over} bytes or more",
                "prompt",
                "too_long",
            )

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; special tokens written out in it count as such.

        add_special_tokens: with the begin (and end) token the model wants around a text.
        """
        # The batch call, of one: it alone spares the offsets, almost half of the time.
        batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = batch[0].ids
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text in which special tokens that are written out are mere text."""
        if self._plain is None:
            self._plain = Tokenizer.from_str(self._tokenizer.to_str())
            self._plain.encode_special_tokens = True
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def render_chat(
        self, messages: Sequence[ChatMessage], tools: Tools | None = None,
        template: TemplateOptions = PLAIN,
    ) -> str:  # fmt: skip
        """The conversation as the model's template writes it, up to where the answer begins.

        With the tools, unless their choice is none.

        Raises TextModelError: there is no template, or it does not accept the conversation.
        """
        if self._template is None:
            raise TextModelError(
                "the model has no chat template; start the node with --chat-template FILE, "
                "or send a prompt in place of a conversation"
            )
        if not messages:
            raise TextModelError("a conversation needs at least one message")
        functions = tools.functions if tools is not None and tools.bind else ()
        if self._template.takes_tools:
            return self._template.render(as_maps(messages), described(functions) or None, template)
        return self._template.render(as_text(messages, functions), None, template)

    def encode_chat(
        self, messages: Sequence[ChatMessage], tools: Tools | None = None, context: int = 0,
        template: TemplateOptions = PLAIN,
    ) -> list[int]:  # fmt: skip
        """Token ids of render_chat: the template has written every special token itself.

        context: as in check_length, which counts what the template has made of the conversation.
        """
        text = self.render_chat(messages, tools, template)
        self.check_length(text, context)
        return self.encode(text, add_special_tokens=False)

    def encode_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids of each word, as it begins a text and as it follows a space where these differ.

        A tokenizer that writes the space as a token of its own gives that token first in the
        second way; it is left out then, for the word is what matters.
        """
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            bare = self.encode(word, add_special_tokens=False)
            spaced = self.encode(" " + word.lstrip(" "), add_special_tokens=False)
            if len(spaced) == len(bare) + 1 and spaced[1:] == bare:
                spaced = bare
            for ids in (bare, spaced):
                if ids:
                    found[tuple(ids)] = None
        return tuple(found)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD.

        Raises TextModelError for an id outside the vocabulary.
        """
        for token in token_ids:
            if not 0 <= token < self.vocab_size:
                raise TextModelError(
                    f"token id {token} is outside the vocabulary (0 .. {self.vocab_size - 1})"
                )
        return self.decode_window(token_ids, skip_special_tokens)

    def decode_window(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """decode without the check: ids that have no token (padding rows) have no text."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text


def load_text_model(
    model_path: str, chat_template: str | None = None, stand_in: int | None = None
) -> TextModel:
    """Loads the text side of a Hugging Face directory or a GGUF file.

    chat_template: path of a Jinja file, or the template itself; None = the model's own.
    stand_in: so many tokens has the one that is made for a directory without a tokenizer; None =
    there has to be one.  Raises TextModelError.
    """
    path = Path(model_path)
    if path.is_dir() and stand_in is not None and not has_tokenizer(path):
        source = stand_in_text(stand_in)
    elif path.is_dir():
        source = read_hf_text(path)
    elif path.is_file():
        source = read_gguf_text(path)
    else:
        raise TextModelError(f"{model_path} does not exist")
    if source.vocab_size == 0:
        raise TextModelError(f"the tokenizer of {model_path} has no tokens")
    return TextModel(source, _template_text(chat_template))


def _template_text(chat_template: str | None) -> str | None:
    if chat_template is None or "{%" in chat_template or "{{" in chat_template:
        return chat_template
    try:
        return Path(chat_template).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise TextModelError(
            f"the chat template {chat_template} cannot be read: {error}"
        ) from error


def _eos_token_id(source: TextSource) -> int | None:
    named = source.named_tokens.get("eos_token")
    return source.tokenizer.token_to_id(named) if isinstance(named, str) else None


def _special_ids(source: TextSource) -> frozenset[int]:
    tokenizer = source.tokenizer
    special = {
        index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special
    }
    for named in source.named_tokens.values():
        for token in [named] if isinstance(named, str) else named:
            index = tokenizer.token_to_id(token)
            # The library's word is final: only what it leaves out itself is special.
            if index is not None and not tokenizer.decode([index], skip_special_tokens=True):
                special.add(index)
    return frozenset(special)
