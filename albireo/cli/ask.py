"""`albireo generate` and `albireo chat`: a node's answer, streamed to the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import click
import msgspec

from albireo.client import AlbireoError, Client, SamplingParams, TemplateOptions

from .files import text_of
from .node import name_option
from .several import with_options

_ADVISED = "the model's"


sampling_options = with_options(
    name_option,
    click.option("--connect", metavar="tls://HOST:PORT",
                 help="A node over TCP, instead of one of this machine."),
    click.option("--api-key-file", metavar="FILE",
                 type=click.Path(exists=True, dir_okay=False),
                 help="Has the key for it, alone."),
    click.option("--ca", metavar="FILE", type=click.Path(exists=True),
                 help="Whom to trust there, instead of the system's authorities (PEM)."),
    click.option("--max-tokens", type=int, help="Most tokens to generate."),
    click.option("--temperature", type=float, show_default=_ADVISED,
                 help="0 = always the best token."),
    click.option("--top-k", type=int, show_default=_ADVISED,
                 help="Keep the k best tokens; 0 = all."),
    click.option("--top-p", type=float, show_default=_ADVISED,
                 help="Keep the best tokens up to this mass."),
    click.option("--min-p", type=float, show_default=_ADVISED,
                 help="Keep tokens with this share of the best one's probability."),
    click.option("--seed", type=int, help="Of the random stream."),
    click.option("--stop", multiple=True, help="Text that ends the answer; repeatable."),
    click.option("--ignore-eos", is_flag=True, help="Go on past the model's end token."),
)  # fmt: skip
"""That both commands have."""


@click.command()
@click.argument("prompt", required=False)
@sampling_options
def generate(prompt: str | None, **given: Any) -> None:
    """Continue PROMPT (or standard input)."""
    if prompt is None:
        prompt = sys.stdin.read()
    with _connected(given) as client:
        answer = client.stream(prompt, _params(client, given))
        click.echo(prompt, nl=False)
        _show(answer)


@click.command()
@click.option("--message", "-m", help="Ask this and leave, instead of a conversation.")
@click.option("--system", help="System message.")
@click.option(
    "--chat-template-kwargs",
    "variables",
    metavar="JSON",
    default="{}",
    help="Variables of the chat template, such as '{\"enable_thinking\": false}'.",
)
@sampling_options
def chat(message: str | None, system: str | None, variables: str, **given: Any) -> None:
    """Talk with the model; an empty line or Ctrl-D ends it."""
    template = _template(variables)
    messages = [{"role": "system", "content": system}] if system else []
    with _connected(given) as client:
        params = _params(client, given)
        while True:
            text = message if message is not None else _ask()
            if not text:
                return
            messages.append({"role": "user", "content": text})
            answer = _show(client.chat(messages, params, template=template, stream=True))
            messages.append({"role": "assistant", "content": answer})
            if message is not None:
                return


@contextlib.contextmanager
def _connected(given: dict[str, Any]) -> Iterator[Client]:
    """A client, of what `given` says, and says no more then; its errors become the command's."""
    name, where, ca = given.pop("name"), given.pop("connect"), given.pop("ca")
    key_file = given.pop("api_key_file")
    key = text_of(key_file, "--api-key-file").strip() if key_file else ""
    try:
        with Client.connect(where, node=name, api_key=key, ca=ca) as client:
            yield client
    except AlbireoError as error:
        raise click.ClickException(str(error)) from None


def _params(client: Client, given: dict[str, Any]) -> SamplingParams:
    """What is given, and beside it what the model's makers advise."""
    chosen = {name: value for name, value in given.items() if value is not None}
    return SamplingParams(**client.welcome.sampling_defaults.fields() | chosen)


def _template(variables: str) -> TemplateOptions:
    try:
        return TemplateOptions(variables=msgspec.json.decode(variables, type=dict[str, Any]))
    except msgspec.DecodeError as error:
        raise click.BadParameter(
            f"a JSON object is expected: {error}", param_hint="--chat-template-kwargs"
        ) from None


def _ask() -> str:
    try:
        text: str = click.prompt("you", prompt_suffix="> ", default="", show_default=False)
    except click.Abort:
        click.echo()
        return ""
    return text


def _show(deltas: Iterable[Any]) -> str:
    """Prints text as it comes; returns the whole."""
    parts = []
    for delta in deltas:
        parts.append(delta.text)
        click.echo(delta.text, nl=False)
        sys.stdout.flush()
    click.echo()
    return "".join(parts)
