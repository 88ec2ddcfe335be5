"""docs/protocol.md and the code say the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from albireo.ipc import protocol
from albireo.ipc.params import SamplingParams
from albireo.ipc.template import TemplateOptions
from albireo.ipc.tls import HANDSHAKE_TIMEOUT_S
from albireo.router import decode, session, texts, validate
from albireo.router.connections import MAX_CONNECTIONS

DOC = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
MESSAGES = [*get_args(protocol.ClientMessage), *get_args(protocol.RouterMessage)]


def section(heading: str) -> str:
    """The text below a heading, up to the next one."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", DOC, re.MULTILINE | re.DOTALL)
    assert found, f"there is no section {heading!r}"
    return found[1]


def rows(text: str) -> dict[str, list[str]]:
    """Cells of the table rows that begin with a `name` (or with a place, and then a name)."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].isdigit():
            cells = cells[1:]
        if re.fullmatch(r"`\w+`", cells[0]):
            found[cells[0].strip("`")] = cells[1:]
    return found


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__name__)
def test_every_message_has_its_fields_in_the_doc(message: type[msgspec.Struct]) -> None:
    tag = message.__struct_config__.tag
    table = rows(section(str(tag)))
    assert table.pop("type")[0] == f'`"{tag}"`'
    assert set(table) == set(message.__struct_fields__)
    if message in get_args(protocol.ClientMessage):
        for field in msgspec.structs.fields(message):
            check_default(table[field.name][1], field)


def test_sampling_parameters_are_in_the_doc() -> None:
    table = rows(section("Sampling parameters"))
    assert list(table) == list(SamplingParams.__struct_fields__)
    for field in msgspec.structs.fields(SamplingParams):
        check_default(table[field.name][1], field)


def test_template_options_are_in_the_doc() -> None:
    table = rows(section("Template options"))
    assert list(table) == list(TemplateOptions.__struct_fields__)
    for field in msgspec.structs.fields(TemplateOptions):
        check_default(table[field.name][1], field)


def check_default(cell: str, field: msgspec.structs.FieldInfo) -> None:
    if field.required:
        assert cell == "", field.name
        return
    if field.default_factory is dict:
        assert cell == "`{}`", field.name
        return
    default: Any = field.default
    said = {None: "nil", True: "true", False: "false", (): "`[]`", "": '`""`'}
    maps = SamplingParams | TemplateOptions
    expected = "`{}`" if isinstance(default, maps) else said.get(default, str(default))
    if isinstance(default, int | float) and not isinstance(default, bool):
        expected = str(default)
    assert cell == expected, field.name


def test_arrays_are_in_the_doc_in_their_order() -> None:
    for kind in (protocol.Delta, protocol.End, protocol.Have):
        text = section(kind.__name__)
        assert f"`[{', '.join(kind.__struct_fields__)}]`" in text
        assert list(rows(text)) == list(kind.__struct_fields__)
    for name in protocol.ModelCard.__struct_fields__:
        assert f"`{name}`" in section("model_list")
    for name in protocol.ChatMessage.__struct_fields__:
        assert f"`{name}`" in section("chat")


def test_error_codes_are_in_the_doc() -> None:
    codes = set(re.findall(r'"(\w+)"', (protocol.Error.__doc__ or "").split("code:")[1]))
    assert codes == set(rows(section("Errors"))) and len(codes) == 10


def test_limits_are_those_of_the_code() -> None:
    text = section("Limits")
    assert protocol.MAX_FRAME_BYTES == 8 << 20 and "8 MiB" in text
    assert f"{session.MAX_IN_FLIGHT} requests" in text and f"{MAX_CONNECTIONS} clients" in text
    assert f"{validate.MAX_DETOKENIZE_IDS:,} ids" in text
    assert texts.MAX_BYTES == 64 << 20 and session.MAX_HELD_ANSWER_BYTES == 1 << 20
    assert f"handshake has {HANDSHAKE_TIMEOUT_S:.0f} s" in text
    assert f"for {session.STALL_TIMEOUT_S:.0f} s is cut off" in text
    assert f"within {session.HELLO_TIMEOUT_S:.0f} s" in section("Errors")
    shortest, longest = decode.SESSION_CHARS
    assert f"{shortest} to {longest} characters" in section("hello")
    assert f"version {protocol.PROTOCOL_VERSION}" in DOC.splitlines()[0]


def test_the_exchange_in_hex_decodes_to_what_is_said() -> None:
    kinds = {"client": protocol.ClientMessage, "router": protocol.RouterMessage}
    decoded = []
    for side, text in re.findall(r"```hex (\w+)\n(.*?)```", DOC, re.DOTALL):
        frame = bytes.fromhex(text)
        assert int.from_bytes(frame[:4], "little") == len(frame) - 4
        decoded.append(msgspec.msgpack.decode(frame[4:], type=kinds[side]))
    end = protocol.End("length", None, 1, 2)
    assert decoded == [
        protocol.Hello(protocol=1, client="doc"),
        protocol.Welcome(
            protocol=1, version="0.1.0", node="default", model="demo",
            max_model_len=8192, vocab_size=49152, max_frame_bytes=8 << 20,
        ),
        protocol.Generate(id=7, prompt="Hi", params=SamplingParams(max_tokens=2, temperature=0.0)),
        protocol.Deltas(items=[protocol.Delta(7, 0, [284], "!")]),
        protocol.Deltas(items=[protocol.Delta(7, 1, [339], " I", end)]),
        protocol.Error(
            id=8, code="invalid_request", message="the prompt is empty", param="prompt"
        ),
    ]  # fmt: skip
