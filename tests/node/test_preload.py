"""What the fork server learns of a model from its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from albireo.node.fork_protocol import Load
from albireo.node.preload import load_everything
from albireo.workers.tokenizer.text_model import TextModelError

from ..tiny_model import TINY_EOS, TINY_VOCAB, write_tiny_model

_OTHER = 257


def load_of(directory: Path, tokenizer: Path | None = None, how: str = "dummy") -> Load:
    return Load(
        model_path=str(directory), model_name="tiny", tokenizer_path=str(tokenizer or directory),
        chat_template=None, device="sim", dtype="auto", load_format=how, tp_degrees=(1,),
        batch_invariant=False, gateways=0,
    )  # fmt: skip


def end_tokens(directory: Path) -> tuple[int, ...]:
    loaded, *_ = load_everything(load_of(directory), lambda _: None)
    return loaded.model.eos_token_ids


@pytest.mark.parametrize(
    ("declared", "found"),
    [
        (TINY_EOS, (TINY_EOS,)),
        (_OTHER, (_OTHER, TINY_EOS)),
        ([TINY_EOS, _OTHER], (TINY_EOS, _OTHER)),
        (None, (TINY_EOS,)),
    ],
)
def test_the_end_token_of_the_tokenizer_ends_answers_too(
    declared: object, found: tuple[int, ...], tmp_path: Path
) -> None:
    write_tiny_model(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": declared}))
    if declared is None:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert end_tokens(tmp_path) == found


def test_an_end_token_without_a_row_of_the_embedding_is_none(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    small = {"vocab_size": TINY_EOS, "eos_token_id": _OTHER}
    assert TINY_EOS < TINY_VOCAB
    (tmp_path / "config.json").write_text(json.dumps(config | small))
    assert end_tokens(tmp_path) == (_OTHER,)


def test_random_weights_need_a_config_alone(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    write_tiny_model(tmp_path)
    (tmp_path / "config.json").rename(bare / "config.json")
    (tmp_path / "tokenizer.json").unlink()
    loaded, text, *_ = load_everything(load_of(bare), lambda _: None)
    assert text.vocab_size == loaded.model.vocab_size == TINY_VOCAB
    assert text.decode(text.encode("text", True), False) == "text"
    for wrong in (load_of(bare, tmp_path), load_of(bare, how="auto")):
        with pytest.raises(TextModelError, match=r"no tokenizer\.json"):
            load_everything(wrong, lambda _: None)
