"""API keys: files, comparison, and which paths ask for one."""

from __future__ import annotations

import hmac
from pathlib import Path

import pytest

from albireo.ipc.keys import ApiKeys, KeyFileError, load_keys

from .played import PlayedLink, post


def test_a_file_has_keys_with_names_and_without(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# clients\n\nalice: key-of-alice\nkey-without-name\n  bob:key:with:colons \n")
    keys = load_keys("single-key", str(path))
    assert keys.name_of_bearer("Bearer key-of-alice") == "alice"
    assert keys.name_of_bearer("Bearer single-key") == "default"
    assert keys.name_of_bearer("Bearer key-without-name") == "key4"
    assert keys.name_of_bearer("Bearer wrong-key") is None
    assert keys.name_of_bearer("Basic key-of-alice") is None
    assert keys.name_of_bearer("") is None and keys.name_of("") is None
    assert keys.name_of("key-of-alice") == "alice" and keys.name_of("key-of-alic") is None
    assert len(keys) == 4


def test_the_first_colon_ends_the_name(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("bob:key:with:colons")
    assert load_keys(None, str(path)).name_of_bearer("Bearer key:with:colons") == "bob"


@pytest.mark.parametrize(
    "text",
    ["", "# nothing\n", "short", "a:has spaces in it", f"{'n' * 65}:key-key-key", ":key-key-key"],
)
def test_a_file_that_cannot_be_used_is_refused_and_no_key_is_shown(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(KeyFileError) as caught:
        load_keys(None, str(path))
    assert "key-key-key" not in str(caught.value)
    assert "spaces in it" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot be read"):
        load_keys(None, str(tmp_path / "none"))


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    real = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append(len(a))
        return real(a, b)

    keys = ApiKeys([("a", "x" * 8), ("b", "y" * 90)])
    monkeypatch.setattr(hmac, "compare_digest", counting)
    keys.name_of_bearer("Bearer " + "x" * 8)
    keys.name_of_bearer("Bearer z")
    assert compared == [32] * 4


def test_a_wrong_key_is_401_and_the_keys_name_is_the_tenant() -> None:
    keys = ApiKeys([("alice", "key-of-alice")])
    link = PlayedLink()
    for headers in ({}, {"authorization": "Bearer nope"}, {"authorization": "key-of-alice"}):
        response = post("/v1/completions", {"prompt": "a"}, link, keys, headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert link.asks == []
    good = {"authorization": "Bearer key-of-alice"}
    assert post("/v1/completions", {"prompt": "a"}, link, keys, good).status_code == 200
    assert link.asks[0].tenant == "alice"
    assert post("/tokenize", {"prompt": "a"}, link, keys).status_code == 401
    for path, body in (
        ("/tokenize", {"prompt": "a"}),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}),
        ("/detokenize", {"tokens": [97]}),
        ("/v1/completions", {"prompt": "a", "echo": True, "logprobs": 0}),
        ("/v1/completions", {"prompt": "a", "add_special_tokens": False}),
    ):
        assert post(path, body, link, keys, good).status_code == 200
    assert link.text_tenants == ["alice"] * 6
    assert post("/ping", b"", link, keys).status_code == 200
