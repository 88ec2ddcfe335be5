"""What clients may ask as a grammar, and what is refused, in bounded time and memory."""

from __future__ import annotations

import json
import resource
import time
from typing import Any

import pytest

from albireo.ipc.grammars import MAX_GRAMMAR_BYTES, Grammar
from albireo.workers.grammar import compile as compiling
from albireo.workers.grammar.compile import GrammarCompiler, GrammarError

from .model import encode, vocabulary

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "name": {"type": "string"}},
    "required": ["x", "name"],
    "additionalProperties": False,
}


def compiler() -> GrammarCompiler:
    return GrammarCompiler(vocabulary())


def matches(grammar: Grammar, words: str) -> bool:
    matcher = vocabulary().matcher(compiler().compile(grammar))
    tokens = encode(words)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("schema", [POINT, json.dumps(POINT)])
def test_a_schema(schema: Any) -> None:
    grammar = Grammar(json_schema=schema)
    assert matches(grammar, '{"x":1,"name":"é\\n"}')
    assert matches(grammar, '{"x": -1, "name": ""}')
    assert not matches(grammar, '{"x": 1.5, "name": ""}')
    assert not matches(grammar, '{"name": "", "x": 1}')
    assert not matches(grammar, '{"x": 1}')


def test_white_space_is_bounded_whatever_the_schema_says() -> None:
    for schema in (POINT, POINT | {"x-guidance": {"whitespace_flexible": True}}):
        grammar = Grammar(json_schema=schema)
        assert not matches(grammar, '{"x":  1,"name":""}')
        assert not matches(grammar, '{\n"x":1,"name":""}')


def test_other_kinds() -> None:
    assert matches(Grammar(json_object=True), '{"a": [1, {"b": null}]}')
    assert not matches(Grammar(json_object=True), "[1]")
    assert matches(Grammar(regex="[0-9]{3}/[a-f]+"), "123/ab")
    assert not matches(Grammar(regex="[0-9]{3}"), "12")
    choice = Grammar(choice=('say "yes"', "no\\", "é\n"))
    assert all(matches(choice, each) for each in choice.choice)
    assert not matches(choice, "no")
    assert matches(Grammar(lark='start: "a"+ "b"'), "aab")
    assert matches(Grammar(lark='root ::= "a" [bc]+ "d"'), "abcd")


def test_a_choice_may_have_any_character() -> None:
    texts = [chr(code) * 2 for code in (*range(0x100), 0x2028, 0xFEFF, 0xFFFF, 0x1F642)]
    choice = Grammar(choice=tuple(texts))
    text = compiler().compile(choice)
    for each in texts:
        matcher = vocabulary().matcher(text)
        tokens = encode(each)
        assert matcher.try_consume_tokens(tokens) == len(tokens), (each, matcher.get_error())


def test_lark_and_gbnf_are_told_apart_by_their_rules() -> None:
    assert matches(Grammar(lark='start: "a ::= b"'), "a ::= b")
    assert matches(Grammar(lark='// b ::= c\nstart: "a"\n  | "root ::= x"'), "root ::= x")
    assert matches(
        Grammar(lark='# start: a\n\n  root::= my-rule\nmy-rule ::= "start: b"'), "start: b"
    )
    begun = time.process_time()
    with pytest.raises(GrammarError):
        compiler().compile(Grammar(lark="\n " * (MAX_GRAMMAR_BYTES // 2) + "a" * 99))
    assert time.process_time() - begun < 0.5


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (Grammar(regex="("), "unclosed group"),
        (Grammar(json_schema={"type": "nope"}), "nope"),
        (Grammar(json_schema="{"), "not valid"),
        (Grammar(json_schema="[1]"), "a schema is a map"),
        (Grammar(json_schema={"oneOf": [{"type": "integer"}, {"type": "number"}]}), "Use anyOf"),
        (Grammar(lark="start: other"), "other"),
        (Grammar(lark="start: start start | start"), "no text that ends matches it"),
        (Grammar(lark="root ::= ((("), "GBNF"),
        (Grammar(json_schema={"$ref": "https://example.com/a"}), "not present"),
        (Grammar(regex="a" * MAX_GRAMMAR_BYTES), f"{MAX_GRAMMAR_BYTES} are the limit"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_cause(grammar: Grammar, said: str) -> None:
    with pytest.raises(GrammarError, match=said) as caught:
        compiler().compile(grammar)
    assert caught.value.param == "grammar"


def deep(levels: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def exponential(levels: int) -> Any:
    """Every level refers to the next twice: 2^levels when it is written out."""
    defs = {
        f"a{level}": {
            "allOf": [{"$ref": f"#/$defs/a{level + 1}"}, {"$ref": f"#/$defs/a{level + 1}"}]
        }
        for level in range(levels)
    }
    return {"$ref": "#/$defs/a0", "$defs": defs | {f"a{levels}": {"type": "integer"}}}


HOSTILE = {
    "deep": Grammar(json_schema=deep(400)),
    "deep text": Grammar(json_schema='{"items":' * 3000 + "{}" + "}" * 3000),
    "repeated": Grammar(regex="((a{1,1000}){1,1000}){1,1000}"),
    "counted": Grammar(regex="(a|b)*a(a|b){5000}"),
    "groups": Grammar(regex="(" * 5000 + "a" + ")" * 5000),
    "classes": Grammar(regex=r"\w{1000}\d{1000}" * 20),
    "enum": Grammar(json_schema={"enum": [f"value number {i}" for i in range(3000)]}),
    "any of": Grammar(
        json_schema={"anyOf": [{"type": "string", "pattern": f"^a{{{i}}}b"} for i in range(800)]}
    ),
    "exponential": Grammar(json_schema=exponential(40)),
    "items": Grammar(
        json_schema={"type": "array", "minItems": 100000, "items": {"type": "integer"}}
    ),
    "length": Grammar(json_schema={"type": "string", "minLength": 10_000_000}),
    "recursion": Grammar(json_schema={"$ref": "#"}),
    "properties": Grammar(
        json_schema={"type": "object", "properties": {f"p{i}": {} for i in range(2500)}}
    ),
    "lark recursion": Grammar(lark="start: start start | start"),
    "multiple": Grammar(json_schema={"type": "number", "multipleOf": 1e-300}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_bounded_in_time_and_memory(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    compiler_cpu = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    begun = time.process_time()
    try:
        compiler().compile(HOSTILE[name])
    except GrammarError as error:
        assert str(error)
    assert time.process_time() - begun < 1.0
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 64 * 1024
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - compiler_cpu
    assert used < compiling.COMPILE_CPU_S + 1.5


def test_a_compiler_that_hangs_or_dies_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(self: Any, grammar: str) -> Any:
        time.sleep(60)

    def burn(self: Any, grammar: str) -> Any:
        while True:
            pass

    def grow(self: Any, grammar: str) -> Any:
        return bytearray(compiling.COMPILE_BYTES * 2)

    monkeypatch.setattr(compiling, "COMPILE_TIMEOUT_S", 0.3)
    for fault, said in ((hang, "more than 0.3 s"), (grow, "MiB of memory")):
        monkeypatch.setattr(type(vocabulary()), "matcher", fault)
        with pytest.raises(GrammarError, match=said):
            compiler().compile(Grammar(regex="a"))
    monkeypatch.setattr(compiling, "COMPILE_TIMEOUT_S", 20.0)
    monkeypatch.setattr(type(vocabulary()), "matcher", burn)
    with pytest.raises(GrammarError, match="1 s of CPU time"):
        compiler().compile(Grammar(regex="a"))


def test_grammars_that_would_hold_up_a_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "MASK_MS", -1)
    with pytest.raises(GrammarError, match="ms; -1 are the limit: make its repetitions shorter"):
        compiler().compile(Grammar(regex="(a?){50}"))
    monkeypatch.setattr(compiling, "COMPILE_MS", -1)
    with pytest.raises(GrammarError, match="ms to compile; -1 are the limit"):
        compiler().compile(HOSTILE["enum"])


def test_what_has_compiled_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiler()
    grammar = Grammar(json_schema=POINT)
    first = made.compile(grammar)
    monkeypatch.setattr(compiling, "_try_apart", lambda *_: "asked again")
    assert made.compile(grammar) == first
    with pytest.raises(GrammarError, match="asked again"):
        made.compile(Grammar(regex="b"))
