"""Hugging Face directories: the same ids and the same text as transformers has for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from albireo.ipc.protocol import ChatMessage
from albireo.workers.tokenizer.text_model import TextModel, TextModelError, load_text_model

from .test_chat_template import CHATML, MISTRAL
from .tiny_tokenizers import NASTY_TEXTS, byte_level, sentencepiece, write_directory

HELLO = [ChatMessage(role="user", content="Hello <|end|>")]


def directory(
    path: Path, tokenizer: Tokenizer, config: dict[str, object], **files: str
) -> tuple[TextModel, AutoTokenizer]:
    """Ours and transformers' view of the same files."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    write_directory(path, tokenizer, tokenizer_config__json=json.dumps(config), **files)
    return load_text_model(str(path)), AutoTokenizer.from_pretrained(path)


NEXT_ID = byte_level().get_vocab_size()
WORD = byte_level().get_vocab()["12"]  # "34" is the next
CONFIGS: dict[str, dict[str, object]] = {
    "bare": {},
    "named": {
        "bos_token": "<|begin|>",
        "eos_token": {"__type": "AddedToken", "content": "<|end|>"},
    },
    "the tokenizer decides over these": {"bos_token": "<|begin|>", "add_bos_token": False},
    "more tokens": {
        "added_tokens_decoder": {
            NEXT_ID + 1: {"content": "<secret>", "special": True, "lstrip": True},
            NEXT_ID: {"content": "<tool>", "special": False, "normalized": False},
        },
        "additional_special_tokens": ["<secret>", "<é>"],
    },
    "a plain token made special": {"pad_token": "éx"},
    "other flags than tokenizer.json's": {
        "added_tokens_decoder": {
            "1": {"content": "<|end|>", "special": True, "lstrip": True, "normalized": False},
            "2": {"content": "<|user|>", "special": False, "normalized": False},
            "3": {"content": "<é>", "special": True, "rstrip": True, "normalized": False},
            str(NEXT_ID - 1): {"content": "éx", "special": True, "normalized": False},
        },
    },
    "words of the vocabulary are added": {
        "added_tokens_decoder": {
            str(WORD): {"content": "12", "special": True},
            str(WORD + 1): {"content": "34", "special": False},
        },
    },
    "no flags at all": {
        "added_tokens_decoder": {
            "3": {"content": "<é>"},
            str(WORD + 1): {"content": "34"},
            str(NEXT_ID): {"content": "<tool>"},
        },
    },
    "another id than tokenizer.json's": {
        "added_tokens_decoder": {str(NEXT_ID + 7): {"content": "<é>", "rstrip": True}},
    },
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_byte_level_directories(tmp_path: Path, config: dict[str, object]) -> None:
    ours, theirs = directory(tmp_path, byte_level(), config)
    check_parity(ours, theirs)
    assert ours.token_bytes is not None and len(ours.token_bytes) == ours.vocab_size
    assert not ours.strips_first_space


def test_sentencepiece_directory(tmp_path: Path) -> None:
    config: dict[str, object] = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    ours, theirs = directory(tmp_path, sentencepiece(), config)
    check_parity(ours, theirs)
    assert ours.token_bytes is None
    assert ours.strips_first_space


def check_parity(ours: TextModel, theirs: AutoTokenizer) -> None:
    assert ours.vocab_size == len(theirs)
    assert ours.special_ids == {
        token
        for token in range(len(theirs))
        if theirs.decode([token]) and not theirs.decode([token], skip_special_tokens=True)
    }
    for text in [*NASTY_TEXTS, "a <tool> b <secret> c éx <s>x</s>"]:
        for special in (False, True):
            ids = ours.encode(text, special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            assert ours.decode(ids, special) == theirs.decode(ids, skip_special_tokens=special)


def test_an_old_directory_names_its_tokens_in_special_tokens_map(tmp_path: Path) -> None:
    names = json.dumps({"bos_token": {"content": "<|begin|>"}, "pad_token": "éx"})
    ours, theirs = directory(
        tmp_path, byte_level(), {"bos_token": "a"}, special_tokens_map__json=names
    )
    check_parity(ours, theirs)
    template = "{{ bos_token }} {{ pad_token }} {{ eos_token }}"
    assert load_text_model(str(tmp_path), template).render_chat(HELLO) == "<|begin|> éx "


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    ours = load_text_model(str(write_directory(tmp_path, tokenizer)))
    assert len(ours.encode("1 2 3 4 5 6 7 8 9", add_special_tokens=False)) > 9
    assert len(ours.encode("1", add_special_tokens=False)) == 1


def test_a_conversation_gets_no_second_begin_token(tmp_path: Path) -> None:
    config = CONFIGS["named"] | {"chat_template": MISTRAL}
    ours, theirs = directory(tmp_path, byte_level(), config)
    conversation = [{"role": "user", "content": HELLO[0].content}]
    expected = theirs.apply_chat_template(
        conversation, add_generation_prompt=True, return_dict=False
    )
    assert ours.encode_chat(HELLO) == expected
    assert ours.encode_chat(HELLO).count(0) == 1


def test_which_template_is_used(tmp_path: Path) -> None:
    listed = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "listed"}]
    ours, _ = directory(tmp_path, byte_level(), {"chat_template": listed})
    assert ours.render_chat(HELLO) == "listed"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "beside"}')
    assert load_text_model(str(tmp_path)).render_chat(HELLO) == "listed"
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_text_model(str(tmp_path)).render_chat(HELLO) == "beside"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_text_model(str(tmp_path)).render_chat(HELLO) == "from the file"
    assert load_text_model(str(tmp_path), "{{ 'given' }}").render_chat(HELLO) == "given"
    given = tmp_path / "mine.jinja"
    given.write_text(CHATML)
    assert "<|im_start|>user" in load_text_model(str(tmp_path), str(given)).render_chat(HELLO)
    with pytest.raises(TextModelError, match=r"nowhere\.jinja cannot be read"):
        load_text_model(str(tmp_path), str(tmp_path / "nowhere.jinja"))


def test_a_model_without_template_says_what_to_do(tmp_path: Path) -> None:
    ours = load_text_model(str(write_directory(tmp_path, byte_level())))
    with pytest.raises(TextModelError, match="--chat-template"):
        ours.encode_chat(HELLO)
    with pytest.raises(TextModelError, match="at least one message"):
        load_text_model(str(tmp_path), CHATML).encode_chat([])


@pytest.mark.parametrize("token", [-1, 10_000, 2**40])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, token: int) -> None:
    ours = load_text_model(str(write_directory(tmp_path, byte_level())))
    with pytest.raises(TextModelError, match=f"token id {token} is outside"):
        ours.decode([5, token], False)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer.json; pass --tokenizer"),
        ({"tokenizer.model": ""}, "has tokenizer.model but no tokenizer.json; write one"),
        ({"tokenizer.json": "{"}, "tokenizer.json is not a usable tokenizer"),
        ({"tokenizer_config.json": "[]"}, "should hold a JSON object"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json cannot be read"),
        (
            {"tokenizer_config.json": '{"added_tokens_decoder": {"9000": {"content": "<far>"}}}'},
            "gives '<far>' the id 9000",
        ),
        ({"tokenizer_config.json": '{"added_tokens_decoder": {"x": 1}}'}, "is malformed"),
        ({"tokenizer_config.json": '{"chat_template": "{% x"}'}, "chat template has an error"),
    ],
)
def test_unusable_directories(tmp_path: Path, files: dict[str, str], message: str) -> None:
    if files and "tokenizer.model" not in files:
        write_directory(tmp_path, byte_level())
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(TextModelError, match=message):
        load_text_model(str(tmp_path))


def test_a_path_that_does_not_exist() -> None:
    with pytest.raises(TextModelError, match="/nowhere does not exist"):
        load_text_model("/nowhere")


def test_loading_starts_no_threads_and_imports_no_torch(tmp_path: Path) -> None:
    """The fork server loads it: a thread would be lost in every fork."""
    write_directory(tmp_path, byte_level())
    program = (
        "import os, sys; from albireo.workers.tokenizer.text_model import load_text_model; "
        "load_text_model(sys.argv[1]).encode('x y z', True); "
        "assert len(os.listdir('/proc/self/task')) == 1; assert 'torch' not in sys.modules"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    environment["OPENBLAS_NUM_THREADS"] = "1"  # numpy's threads are the fork server's to prevent
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True, env=environment)
