"""What a model's makers advise for sampling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from albireo.ipc.params import SamplingDefaults
from albireo.workers.models.config import ModelError
from albireo.workers.models.generation_config import read_sampling_defaults

QWEN3 = {
    "bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643],
    "temperature": 0.6, "top_k": 20, "top_p": 0.95, "transformers_version": "4.51.0",
}  # fmt: skip


def defaults(directory: Path, text: str) -> SamplingDefaults:
    (directory / "generation_config.json").write_text(text)
    return read_sampling_defaults(directory)


def test_it_is_taken_as_it_is(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == SamplingDefaults()
    found = defaults(tmp_path, json.dumps(QWEN3))
    assert found == SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95)
    assert found.fields() == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}


def test_what_says_nothing_advises_nothing(tmp_path: Path) -> None:
    text = '{"temperature": null, "top_k": -1, "min_p": 0, "repetition_penalty": 1.05}'
    found = defaults(tmp_path, text)
    assert found == SamplingDefaults(top_k=0, min_p=0.0, repetition_penalty=1.05)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"temperature": "hot"}', r"temperature"),
        ('{"temperature": -1}', r"temperature must be between 0 and 100"),
        ('{"top_p": 0}', r"top_p must be above 0"),
        ('{"top_k": 1.5}', r"top_k"),
    ],
)
def test_what_no_request_could_have_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"generation_config.json: .*{reason}.*openai"):
        defaults(tmp_path, text)
    with pytest.raises(ModelError, match="a JSON object is expected"):
        defaults(tmp_path, "[]")
