"""LLM: a model for one program, on a node that lives as long as the program wants it.

    LLM ── owns ──▶ OwnedNode (a process tree of its own)
     └──── Client ─────▶ its router

The node ends with close(), with the LLM's last reference, with the interpreter,
and with the process, however that dies (node/owned.py).
"""

from __future__ import annotations

import difflib
import functools
import os
import secrets
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, cast, overload

import msgspec

from albireo.client import (
    ChatMessage,
    Client,
    Completion,
    NodeNotRunning,
    SamplingParams,
    TemplateOptions,
)
from albireo.client.requests import (
    Messages,
    Prompt,
    SamplingOverrides,
    chat_message,
    generate_message,
    resolve_params,
)
from albireo.node.options import NodeOptions, OptionError, parse_groups
from albireo.node.owned import OwnedNode

from .batch import Batch, Request, Result
from .progress import counting, starting

Params = SamplingParams | Sequence[SamplingParams] | None
_ROUTER_BACK_S = 10.0


class LLM:
    """A model that answers batches of prompts.

        with LLM("demo", groups="2x1") as llm:
            for answer in llm.generate(["One", "Two"], max_tokens=16):
                print(answer.text)

    Threads may share it.  Its node is one like any other: `albireo node status
    --name` with `llm.name` shows it, and so does `albireo trace`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "demo",
        *,
        groups: str | Sequence[int] = "1x1",
        progress: bool = True,
        **options: Any,
    ) -> None:
        """Starts the node and waits until it can answer.

        model: a Hugging Face directory, a GGUF file, or "demo".
        groups: "2x4" is two groups of four tensor-parallel ranks.
        progress: show start and batches on standard error, when that is a terminal.
        options: fields of albireo.node.options.NodeOptions: device, dtype,
            max_model_len, max_num_seqs, gpu_memory_utilization and so on.

        Raises OptionError or PathError (ValueErrors), TypeError for an option
        that does not exist, and NodeStartError (a RuntimeError) with the node's
        reason.
        """
        chosen = _node_options(os.fspath(model), groups, options)
        self._progress = progress
        # Of those that wait, as many as run are enough to never leave a group without work.
        waiting = min(chosen.max_num_seqs, chosen.max_num_queued_reqs)
        self._room = len(chosen.groups) * (chosen.max_num_seqs + waiting)
        with starting(progress) as say:
            node = OwnedNode(chosen, say)
        try:
            self._running = _Running(node)
        except BaseException:
            node.stop()
            raise
        self._end = weakref.finalize(self, self._running.close)

    @property
    def name(self) -> str:
        """The node's name."""
        return self._running.node.name

    @property
    def client(self) -> Client:
        """A client of the node: for streams, tokens of texts, the status.  Raises AlbireoError."""
        return self._running.connected()

    def get_default_sampling_params(self) -> SamplingParams:
        """As the model's makers advise, in its generation_config.json.  Raises AlbireoError."""
        return SamplingParams(**self.client.welcome.sampling_defaults.fields())

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        return_errors: Literal[False] = False,
        progress: bool | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> list[Completion]: ...
    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        return_errors: Literal[True],
        progress: bool | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> list[Result]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        return_errors: bool = False,
        progress: bool | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> list[Completion] | list[Result]:
        """Continues prompts, all at once as far as the node has room; answers in their order.

        prompts: a text, token ids, or any number of either.
        params: for all of them, or one for each; without any those of
            get_default_sampling_params().  Keywords are fields of SamplingParams and
            go before them.
        return_errors: a prompt that fails has its AlbireoError in the place of
            its answer.  Otherwise the first of them is raised, with a note that
            names the prompt, and the rest is cancelled.
        """
        each = _prompts(prompts)
        chosen = _params(params, overrides, len(each), self.get_default_sampling_params())
        requests = [
            Request(functools.partial(_generate, prompt, its), its.n)
            for prompt, its in zip(each, chosen, strict=True)
        ]
        return self._run(requests, return_errors, progress)

    @overload
    def chat(
        self,
        conversations: Messages | Sequence[Messages],
        params: Params = None,
        *,
        return_errors: Literal[False] = False,
        progress: bool | None = None,
        template: TemplateOptions | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> list[Completion]: ...
    @overload
    def chat(
        self,
        conversations: Messages | Sequence[Messages],
        params: Params = None,
        *,
        return_errors: Literal[True],
        progress: bool | None = None,
        template: TemplateOptions | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> list[Result]: ...
    def chat(
        self,
        conversations: Messages | Sequence[Messages],
        params: Params = None,
        *,
        return_errors: bool = False,
        progress: bool | None = None,
        template: TemplateOptions | None = None,
        **overrides: Unpack[SamplingOverrides],
    ) -> list[Completion] | list[Result]:
        """Answers one conversation, or any number of them, as generate() does prompts.

        template: what the model's chat template is told besides, for all of them.
        """
        each = _conversations(conversations)
        chosen = _params(params, overrides, len(each), self.get_default_sampling_params())
        requests = [
            Request(functools.partial(_chat, messages, its, template), its.n)
            for messages, its in zip(each, chosen, strict=True)
        ]
        return self._run(requests, return_errors, progress)

    def close(self) -> None:
        """Stops the node; what other threads still wait for fails.  May be called twice."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(
        self, requests: list[Request], return_errors: bool, progress: bool | None
    ) -> list[Any]:
        wanted = self._progress if progress is None else progress
        with counting(wanted, len(requests)) as show:

            def on_end(result: Result) -> None:
                if isinstance(result, Completion):
                    show(result.usage.prompt_tokens, result.usage.completion_tokens)
                else:
                    show(0, 0)

            batch = Batch(requests, self._room, self._running.connected, on_end)
            return batch.run(return_errors=return_errors)


class _Running:
    """The node and the client of an LLM; it does not hold the LLM, so that one can be dropped."""

    def __init__(self, node: OwnedNode) -> None:
        self.node = node
        self._owner = os.getpid()
        self._closed = False
        self._client = Client.connect(
            node.facts["socket"], client_name="LLM", reconnect_s=_ROUTER_BACK_S
        )

    def connected(self) -> Client:
        """The client.  Raises NodeNotRunning."""
        if os.getpid() != self._owner:
            raise NodeNotRunning("this LLM belongs to the process that this one was forked from")
        if self._closed:
            raise NodeNotRunning("this LLM is closed")
        if not self.node.alive:
            raise NodeNotRunning(
                f"the node of this LLM has died; `albireo node logs --name {self.node.name}` may "
                "tell why"
            )
        return self._client

    def close(self) -> None:
        """Does nothing in a forked child, whose copies are not to end the parent's node."""
        if os.getpid() != self._owner:
            return
        self._closed = True
        self._client.close()
        self.node.stop()


def _node_options(
    model: str, groups: str | Sequence[int], options: Mapping[str, Any]
) -> NodeOptions:
    """Raises TypeError for names, OptionError for values."""
    known = set(NodeOptions.__struct_fields__) - {"name", "model", "groups"}
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"there is no node option {name!r}{hint}")
    options = dict(options)
    if options.get("journal") is not None:
        options["journal"] = os.path.abspath(options["journal"])
    if not isinstance(groups, Iterable):
        raise TypeError(
            f"groups={groups!r}: give GROUPSxTP such as '2x4', or the ranks of each group, such as "
            "(4, 4)"
        )
    degrees = parse_groups(groups) if isinstance(groups, str) else tuple(groups)
    name = f"llm-{os.getpid()}-{secrets.token_hex(3)}"
    try:
        return msgspec.convert(
            {**options, "name": name, "model": model, "groups": degrees}, NodeOptions
        )
    except msgspec.ValidationError as error:
        raise OptionError(str(error)) from None


def _prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, or several, to a list of them."""
    if isinstance(prompts, str | Mapping):  # a map is no prompt: generate_message says so
        return [cast(Prompt, prompts)]
    if len(prompts) and not _has_length(prompts[0]):
        return [cast("Sequence[int]", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def _has_length(item: Any) -> bool:
    """A text and ids have one, an id has none.  Attributes do not tell NumPy's apart."""
    try:
        len(item)
    except TypeError:
        return False
    return True


def _conversations(conversations: Messages | Sequence[Messages]) -> list[Messages]:
    """One conversation, or several, to a list of them."""
    if len(conversations) and isinstance(conversations[0], ChatMessage | Mapping):
        return [cast(Messages, conversations)]
    return list(cast(Sequence[Messages], conversations))


def _params(
    params: Params, overrides: Mapping[str, Any], count: int, defaults: SamplingParams
) -> Sequence[SamplingParams]:
    """Checked parameters of each of `count` prompts.  Raises TypeError, ValueError, InvalidRequest.

    defaults: in place of None.  What is neither one nor a collection of them is refused as one.
    """
    if isinstance(params, Mapping) or not isinstance(params, Collection):
        return [resolve_params(defaults if params is None else params, overrides)] * count
    if len(params) != count:
        raise ValueError(
            f"{len(params)} parameters for {count} prompts: give one for all, or one for each"
        )
    return [resolve_params(each, overrides) for each in params]


def _generate(prompt: Prompt, params: SamplingParams, number: int) -> msgspec.Struct:
    return generate_message(number, prompt, params)


def _chat(
    messages: Messages, params: SamplingParams, template: TemplateOptions | None, number: int
) -> msgspec.Struct:
    return chat_message(number, messages, params, template=template)
