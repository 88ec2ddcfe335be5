"""20 schemas of the kinds that applications ask for, all bounded: no answer can go on for ever."""

from __future__ import annotations

from typing import Any


def text(most: int = 16, **more: Any) -> dict[str, Any]:
    return {"type": "string", "maxLength": most} | more


def number(low: int = 0, high: int = 1000) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


def array(items: Any, most: int = 3, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "maxItems": most} | more


def fields(**properties: Any) -> dict[str, Any]:
    """An object with exactly these."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


POINT = fields(x=number(-99, 99), y=number(-99, 99))
OPTIONAL = fields(id=number(), note=text()) | {"required": ["id"]}

SCHEMAS: dict[str, Any] = {
    "person": fields(name=text(), age=number(0, 150)),
    "optional": OPTIONAL,
    "nested": fields(user=fields(name=text(), at=POINT), active={"type": "boolean"}),
    "list of texts": array(text(10), 4, minItems=1),
    "list of objects": array(POINT, 3, minItems=2),
    "enum": {"enum": ["red", "green", "blue", 7, None, True]},
    "const": fields(version={"const": 2}, kind={"const": "report"}),
    "null or text": fields(name={"type": ["string", "null"], "maxLength": 8}),
    "any of": {"anyOf": [POINT, fields(name=text(8)), number()]},
    "one of by kind": {
        "oneOf": [
            fields(kind={"const": "circle"}, radius=number(1, 9)),
            fields(kind={"const": "square"}, side=number(1, 9)),
        ]
    },
    "references": {
        "$defs": {"point": POINT},
        **fields(start={"$ref": "#/$defs/point"}, end={"$ref": "#/$defs/point"}),
    },
    "tree": {
        "$defs": {
            "leaf": fields(value=number()),
            "node": fields(
                value=number(), children=array({"$ref": "#/$defs/leaf"}, 2)
            ),
        },
        **fields(root={"$ref": "#/$defs/node"}),
    },
    "pattern": fields(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    "date": fields(day={"type": "string", "format": "date"}),
    "uuid": fields(id={"type": "string", "format": "uuid"}),
    "email choice": fields(contact={"enum": ["mail", "phone"]}, times=array(number(0, 23), 2)),
    "tuple": {
        "type": "array", "prefixItems": [text(6), number(), {"type": "boolean"}],
        "items": False, "minItems": 3, "maxItems": 3,
    },
    "multiples": fields(even={"type": "integer", "minimum": 0, "maximum": 98, "multipleOf": 2}),
    "all of": {"allOf": [fields(a=number(), b=number()), {"properties": {"a": {"maximum": 9}}}]},
    "map": {
        "type": "object", "patternProperties": {"^[a-z]{1,6}$": number(0, 9)},
        "additionalProperties": False, "maxProperties": 2,
    },
}  # fmt: skip
