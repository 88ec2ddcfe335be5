"""Chat templates render as in transformers, and cannot harm the process they run in."""

from __future__ import annotations

import threading
from datetime import datetime

import pytest
from transformers import PreTrainedTokenizerFast

from albireo.ipc.template import TemplateOptions
from albireo.workers.tokenizer import chat_template
from albireo.workers.tokenizer.chat_template import ChatTemplate, ChatTemplateError
from albireo.workers.tokenizer.errors import TextModelError

from .tiny_tokenizers import byte_level

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' -%}
{{ message['content'] + eos_token }}
{%- else -%}
{{ raise_exception('Only user and assistant roles are supported!') }}
{%- endif -%}
{% endfor %}"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set prefix = "" -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = 'model' if turn['role'] == 'assistant' else turn['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}
    {%- if turn['content'] is string -%}
        {{ turn['content'] | trim }}
    {%- elif turn['content'] is iterable -%}
        {%- for item in turn['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""

QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' + (tools | tojson) }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "system" and loop.first %}{%- continue %}{%- endif %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- if loop.index0 > ns.last %}{% generation %}{{- '!' }}{% endgeneration %}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>' }}{%- endif %}
{%- endif %}
{{- {'a': "<é>", 'b': [1, none]} | tojson(indent=2) }}
"""

TEMPLATES = {"chatml": CHATML, "gemma": GEMMA, "llama3": LLAMA3, "mistral": MISTRAL, "qwen": QWEN}
CONVERSATIONS = [
    [("user", "Hi")],
    [
        ("system", " Be brief. \n"),
        ("user", "Hi <b>&'\"</b> é"),
        ("assistant", "Hello."),
        ("user", ""),
    ],
    [("user", "a\n\nb"), ("assistant", "<think>\nx\n</think>\n\nc"), ("user", "{{ d }} {% e %}")],
    [("assistant", "first"), ("user", "then")],
    [("tool", "unknown role")],
]
NAMED = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_renders_as_transformers_does(source: str, messages: list[tuple[str, str]]) -> None:
    conversation = [{"role": role, "content": content} for role, content in messages]
    reference = PreTrainedTokenizerFast(tokenizer_object=byte_level(), **NAMED)
    try:
        expected = reference.apply_chat_template(
            conversation, chat_template=source, tokenize=False, add_generation_prompt=True
        )
    except Exception as refusal:
        with pytest.raises(ChatTemplateError, match=str(refusal)[:30]):
            ChatTemplate(source, NAMED).render(conversation)
    else:
        assert ChatTemplate(source, NAMED).render(conversation) == expected


GOING_ON = [
    [("user", "Say it."), ("assistant", "Here it")],
    [("user", "Say it."), ("assistant", "  Here it is:  ")],
    [("user", "Say it, Say it"), ("assistant", "Say it")],
    [("user", "Only a question")],
]


@pytest.mark.parametrize("messages", GOING_ON)
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_the_last_message_is_continued_as_in_transformers(
    source: str, messages: list[tuple[str, str]]
) -> None:
    conversation = [{"role": role, "content": content} for role, content in messages]
    reference = PreTrainedTokenizerFast(tokenizer_object=byte_level(), **NAMED)
    expected = reference.apply_chat_template(
        conversation, chat_template=source, tokenize=False, continue_final_message=True
    )
    options = TemplateOptions(continue_final_message=True)
    assert ChatTemplate(source, NAMED).render(conversation, None, options) == expected
    assert conversation[-1]["content"] == messages[-1][1]


def test_a_message_that_is_not_written_cannot_be_continued() -> None:
    template = ChatTemplate("{{ messages[0]['content'] }}", {})
    options = TemplateOptions(continue_final_message=True)
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ChatTemplateError, match="leaves out the text of the last message"):
        template.render(conversation, None, options)


def test_a_template_has_its_variables_and_ends_as_asked() -> None:
    template = ChatTemplate(
        "{% if enable_thinking is defined and enable_thinking is false %}no {% endif %}"
        "{{ messages[-1]['content'] }}{{ style }}{% if add_generation_prompt %}>{% endif %}",
        {"style": "plain"},
    )
    said = [{"role": "user", "content": "a"}]
    assert template.render(said) == "aplain>"
    variables = {"enable_thinking": False, "style": ["x"], "unknown": 1}
    assert template.render(said, None, TemplateOptions(variables=variables)) == "no a['x']>"
    ended = TemplateOptions(add_generation_prompt=False)
    assert template.render(said, None, ended) == "aplain"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (TemplateOptions(add_generation_prompt=True, continue_final_message=True), "or begins"),
        (TemplateOptions(variables={"messages": []}), "'messages' is no variable"),
        (TemplateOptions(variables={"add_generation_prompt": False}), "is no variable"),
        (TemplateOptions(variables={str(n): n for n in range(65)}), "at most 64 variables"),
    ],
)
def test_options_that_cannot_be(options: TemplateOptions, reason: str) -> None:
    assert reason in (options.fault() or "")
    assert TemplateOptions().fault() is None


def test_a_refusal_is_in_the_words_of_the_template() -> None:
    with pytest.raises(ChatTemplateError) as error:
        ChatTemplate(MISTRAL, NAMED).render([{"role": "assistant", "content": "no"}])
    assert str(error.value) == (
        "the chat template refuses this conversation: "
        "Conversation roles must alternate user/assistant/user/assistant/..."
    )


def test_the_date_is_there() -> None:
    rendered = ChatTemplate("{{ strftime_now('%Y') }}", {}).render([])
    assert abs(int(rendered) - datetime.now().year) <= 1


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ 1 / 0 }}",
        "{{ messages[5].content + 'x' }}",
        "{% for a in range(10 ** 9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_a_template_must_not_do_is_an_error_of_the_request(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="failed on this conversation"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


def test_output_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_MAX_OUTPUT_CHARS", 1000)
    source = "{% for i in range(99999) %}{{ 'xxxxxxxxxx' }}{% endfor %}"
    with pytest.raises(ChatTemplateError, match="more than 1000 characters"):
        ChatTemplate(source, {}).render([])


def test_a_template_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_MAX_CPU_SECONDS", 0.05)
    loops = "{% for i in range(9999) %}" * 4 + "{% endfor %}" * 4
    with pytest.raises(ChatTemplateError, match=r"more than 0\.05 s of CPU time"):
        ChatTemplate(loops, {}).render([])


def test_renders_outside_the_main_thread_too() -> None:
    rendered: list[str] = []
    template = ChatTemplate(CHATML, {})
    messages = [{"role": "a", "content": "b"}]
    thread = threading.Thread(target=lambda: rendered.append(template.render(messages)))
    thread.start()
    thread.join()
    assert rendered == ["<|im_start|>a\nb<|im_end|>\n\n<|im_start|>assistant\n"]


def test_a_source_that_is_no_template_names_its_line() -> None:
    with pytest.raises(TextModelError, match="line 2"):
        ChatTemplate("fine\n{% if %}", {})
