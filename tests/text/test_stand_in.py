"""A model of random weights has text without a tokenizer's files, and no other model has."""

from __future__ import annotations

from pathlib import Path

import pytest

from albireo.workers.tokenizer.text_model import TextModelError, load_text_model


def test_text_of_bytes(tmp_path: Path) -> None:
    text = load_text_model(str(tmp_path), stand_in=1000)
    assert text.vocab_size == 1000 and text.eos_token_id == 256
    said = "any bytes: é\n"
    ids = text.encode(said, True)
    assert len(ids) == len(said.encode()) and max(ids) < 256
    assert text.decode(ids, False) == said
    assert text.decode([*ids, 999], False) == said + " 999"
    assert text.token_bytes is not None and text.token_bytes[257] == b" 257"


def test_only_where_it_is_asked_for_and_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(TextModelError, match=r"has no tokenizer\.json; pass --tokenizer"):
        load_text_model(str(tmp_path))
    with pytest.raises(TextModelError, match="256 tokens has no room for 256 bytes"):
        load_text_model(str(tmp_path), stand_in=256)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(TextModelError, match=r"has tokenizer\.model but no tokenizer\.json"):
        load_text_model(str(tmp_path), stand_in=1000)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TextModelError, match="not a usable tokenizer"):
        load_text_model(str(tmp_path), stand_in=1000)
