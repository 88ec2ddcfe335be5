"""/openapi.json: whole, and about every path that there is."""

from __future__ import annotations

from typing import Any

import msgspec

from albireo.gateway.app import _ENDPOINTS
from albireo.gateway.openapi import document


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*(references(each) for each in value.values()))
    if isinstance(value, list):
        return set().union(*(references(each) for each in value))
    return set()


def test_every_reference_leads_somewhere() -> None:
    found = msgspec.json.decode(document("1"))
    schemas = found["components"]["schemas"]
    for each in references(found):
        assert each.removeprefix("#/components/schemas/") in schemas
    assert {"CompletionRequest", "ChatRequest", "ErrorAnswer"} <= set(schemas)
    assert schemas["ChatRequest"]["additionalProperties"] is False
    assert schemas["Message"]["additionalProperties"] == {"type": "null"}


def test_every_endpoint_is_in_it() -> None:
    paths = msgspec.json.decode(document("1"))["paths"]
    for path, (methods, _) in _ENDPOINTS.items():
        if path == "/openapi.json":
            continue
        assert {each.lower() for each in methods if each != "HEAD"} == set(paths[path])
