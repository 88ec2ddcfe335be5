"""What a model's makers advise reaches every door of a node, and `openai` leaves it out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner

from albireo import LLM, SamplingParams
from albireo.cli.main import main
from albireo.ipc.params import SamplingDefaults

from ..tiny_model import write_tiny_model

pytestmark = pytest.mark.node

PROMPT = "abc"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose makers advise the best token, always."""
    path = tmp_path_factory.mktemp("advised")
    write_tiny_model(path)
    (path / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "top_k": 1}))
    return path


@pytest.fixture(scope="module")
def llm(module_home: Path, model: Path) -> Iterator[LLM]:
    fields: Any = {"device": "cpu", "dtype": "float32", "load_format": "dummy"}
    with LLM(model, uds=str(module_home / "http.sock"), **fields) as llm:
        yield llm


def texts(llm: LLM, *params: Any, **overrides: Any) -> set[str]:
    """Of four answers with seeds of their own."""
    found = llm.generate([PROMPT] * 4, *params, max_tokens=12, ignore_eos=True, **overrides)
    return {answer.text for answer in found}


def test_answers_are_as_advised_where_nothing_else_is_said(llm: LLM, module_home: Path) -> None:
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.7, top_k=1)
    assert llm.client.welcome.sampling_defaults == SamplingDefaults(temperature=0.7, top_k=1)
    (best,) = texts(llm, temperature=0)
    assert texts(llm) == {best}
    assert len(texts(llm, top_k=0, temperature=2.0)) == 4
    # Parameters are what they say, as in vLLM.
    assert len(texts(llm, SamplingParams(temperature=2.0))) == 4
    body = {"prompt": [PROMPT] * 4, "max_tokens": 12, "ignore_eos": True}
    with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(module_home / "http.sock"))) as http:
        for more, count in (({}, 1), ({"top_k": -1, "temperature": 2.0}, 4)):
            answer = http.post("http://node/v1/completions", json=body | more).json()
            assert len({choice["text"] for choice in answer["choices"]}) == count
    words = ["generate", PROMPT, "--name", llm.name, "--max-tokens", "12", "--ignore-eos"]
    for more, same in (([], True), (["--top-k", "0", "--temperature", "2", "--seed", "1"], False)):
        done = CliRunner().invoke(main, [*words, *more])
        assert done.exit_code == 0 and (done.output == f"{PROMPT}{best}\n") == same


def test_they_can_be_left_out(module_home: Path, model: Path) -> None:
    with LLM(model, device="sim", sampling_defaults="openai") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()
