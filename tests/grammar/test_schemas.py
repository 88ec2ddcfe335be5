"""Answers of the demo model at temperature 1 are valid, every one: 20 schemas, one judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from albireo.client import Client, Grammar

from .schemas import SCHEMAS

pytestmark = [pytest.mark.demo, pytest.mark.node]

_FORMATS = jsonschema.FormatChecker(("date", "uuid"))


def why_wrong(schema: Any, text: str, finish_reason: str) -> str | None:
    """None: the answer is whole and valid."""
    if finish_reason != "stop":
        return f"{finish_reason}: {text[-80:]!r}"
    try:
        judge = jsonschema.Draft202012Validator(schema, format_checker=_FORMATS)
        judge.validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{text!r}: {str(error)[:200]}"
    return None


def count_valid(start_node: Callable[..., str], model: Path, tries: int) -> int:
    """Of `tries` answers to each schema; prints those that are not."""
    node = start_node(name="d", model=str(model), device="cpu")
    valid = 0
    with Client.connect(node=node) as client:
        for seed, (name, schema) in enumerate(SCHEMAS.items()):
            question = f"Give me an example of {name}, as JSON."
            answer = client.chat(
                [{"role": "user", "content": question}], n=tries, seed=1000 * seed,
                temperature=1.0, max_tokens=400, grammar=Grammar(json_schema=schema),
            )  # fmt: skip
            for choice in answer.choices:
                wrong = why_wrong(schema, choice.text, choice.finish_reason)
                valid += wrong is None
                if wrong is not None:
                    print(f"{name}: {wrong}")
    return valid


def test_an_answer_to_each_schema(start_node: Callable[..., str], demo_model_path: Path) -> None:
    assert len(SCHEMAS) == 20
    assert count_valid(start_node, demo_model_path, 1) == 20


@pytest.mark.parity
def test_200_of_200(start_node: Callable[..., str], demo_model_path: Path) -> None:
    valid = count_valid(start_node, demo_model_path, 10)
    print(f"{valid} of {10 * len(SCHEMAS)} answers to {len(SCHEMAS)} schemas are valid")
    assert valid == 200


@pytest.mark.parametrize(
    ("text", "reason"), [('{"name":"a","age":151}', "stop"), ("{", "stop"), ("{}", "length")]
)
def test_the_judge_judges(text: str, reason: str) -> None:
    assert why_wrong(SCHEMAS["person"], text, reason) is not None
    assert why_wrong(SCHEMAS["person"], '{"name":"a","age":15}', "stop") is None
