"""Chat templates: which one is used, what it may do, and what the built-in ones train."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from assets import asset
from chats import ROWS, TOKENIZERS, template, tokenizer, trained_text

from megalite.text.chat import ChatTemplate, find_template, turn_ends
from megalite.text.conversations import normalise
from megalite.text.masks import weighted_spans
from megalite.text.messages import RowError
from megalite.text.tokenizer import load_tokenizer

TURNS = ("user", "assistant") * 2


@pytest.mark.parametrize("name", ["chatml", "llama2", "llama3", "qwen", "mistral", "alpaca", "plain"])
@pytest.mark.parametrize("which", TOKENIZERS)
def test_every_built_in_trains_the_answers_and_their_ends(which: str, name: str) -> None:
    row = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}] * 2}
    chat, eos = template(name, which), tokenizer(which).control_string(tokenizer(which).eos_id)
    end = {"chatml": "<|im_end|>", "qwen": "<|im_end|>", "llama3": "<|eot_id|>"}.get(name, eos)
    if name == "llama2":
        end = f" {end}"
    lead = "" if name in ("chatml", "qwen", "llama3", "alpaca") else " "
    if end.strip() in tokenizer(which).controls:
        assert trained_text(row, chat, which) == f"{lead}two three{end}" * 2
        assert trained_text(row, chat, which, "last") == f"{lead}two three{end}"
    rendered = chat.render(normalise(row))
    assert [rendered.text[s.start : s.stop] for s in rendered.spans] == [f"{lead}two three{end}"] * 2
    assert trained_text(row, chat, which, "all") == rendered.text
    # the conversation continues from the prompt that generation uses
    assert rendered.text.startswith(chat.prompt(normalise(row).messages[:3]))


def test_generation_in_a_macro_and_a_set_block() -> None:
    """Marks are part of the text, so they survive however a template builds it."""
    source = (
        "{% macro say(m) %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{% set out %}{{ m.role }}: {% if m.role == 'assistant' %}{{ say(m) }}"
        "{% else %}{{ m.content }}{% endif %}{% endset %}{{ out | trim }}\n{% endfor %}"
    )
    rendered = ChatTemplate("mine", source, tokenizer("smollm2")).render(normalise(ROWS["same words"]))
    assert rendered.text == "user: yes\nassistant: yes<|im_end|>\nuser: yes\nassistant: yes<|im_end|>\n"
    assert [rendered.text[s.start : s.stop] for s in rendered.spans] == ["yes<|im_end|>"] * 2
    assert [s.message for s in rendered.spans] == [1, 3]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        # a header that a prompt would not have
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "writes a header before the assistant"),
        ("{% for m in messages|reverse %}{{ m.content }}{% endfor %}", "assistant's text cannot be located"),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "has a generation block around text that is not the assistant",
        ),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "message 3: .* drops or changes its content"),
        ("{{ raise_exception('Only one turn!') }}", "template mine: Only one turn!"),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{{ 'a' + 1 }}", "cannot render it"),
    ],
)
def test_a_template_that_cannot_be_masked_is_refused(source: str, message: str) -> None:
    conversation = normalise({"messages": [{"role": r, "content": c} for r, c in zip(TURNS, "abcd")]})
    with pytest.raises(RowError, match=message):
        weighted_spans(
            conversation, ChatTemplate("mine", source, tokenizer("smollm2")).render(conversation), "assistant"
        )


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.items() }}",
    ],
)
def test_templates_run_in_a_sandbox(source: str) -> None:
    chat = ChatTemplate("mine", source, tokenizer("smollm2"))
    with pytest.raises(RowError, match="unsafe"):
        chat.prompt(normalise(ROWS["same words"]).messages)


def test_which_template(tmp_path: Path) -> None:
    smollm2, mistral = tokenizer("smollm2"), tokenizer("mistral-v3")
    assert find_template(None, smollm2)[0] == "chat_template.jinja"
    assert find_template("llama3", smollm2)[0] == "llama3"
    (tmp_path / "mine.jinja").write_text("{{ 1 }}")
    assert find_template(str(tmp_path / "mine.jinja"), smollm2) == ("mine.jinja", "{{ 1 }}")
    with pytest.raises(
        ValueError,
        match=r"no chat template next to it .* data\.template to a \.jinja file or one of alpaca",
    ):
        find_template(None, mistral)
    with pytest.raises(ValueError, match=r"no chat template chatlm: use a \.jinja file or one of"):
        find_template("chatlm", smollm2)
    with pytest.raises(ValueError, match=r"chat template mine, line 2: "):
        ChatTemplate("mine", "{{ 1 }}\n{% for %}", smollm2)
    shutil.copy(smollm2.path, tmp_path / "tokenizer.json")
    config = {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    name, source = find_template(None, load_tokenizer(tmp_path))
    assert name == "chat_template of tokenizer_config.json"
    both = ChatTemplate(name, source, load_tokenizer(tmp_path))
    asked = normalise(ROWS["same words"]).messages
    assert (both.prompt(asked), both.prompt(asked, [{"name": "look"}])) == ("d", "t")


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def text(row: Any, name: str) -> str:
    tokenizer = load_tokenizer(asset("smollm2"))
    return ChatTemplate(*find_template(name, tokenizer), tokenizer).render(normalise(row)).text


def test_alpaca_has_a_prompt_for_rows_with_an_input() -> None:
    row = {"instruction": "Translate to English.", "input": "Bonjour", "output": "Hello"}
    right = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nTranslate to English.\n\n### Input:\n"
        "Bonjour\n\n### Response:"
    )
    assert text(row, "alpaca").removeprefix("<|im_start|>").startswith(right)
    assert "### Input" not in text({**row, "input": ""}, "alpaca")
    assert "<|im_start|>user\nTranslate to English.\nBonjour<|im_end|>" in text(row, "chatml")


@pytest.mark.parametrize("name", ["llama2", "mistral"])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Answer in French."}]])
def test_the_assistant_may_not_speak_first_where_the_template_has_no_place_for_it(name: str, system: Any) -> None:
    with pytest.raises(RowError, match="no place for a message of role assistant before the first one of role user"):
        text({"messages": [*system, ANSWER, USER, ANSWER]}, name)


@pytest.mark.parametrize("name", ["llama2", "mistral"])
@pytest.mark.parametrize("turns", [[USER, USER, ANSWER], [USER, ANSWER, ANSWER], [USER, ANSWER, USER, ANSWER, ANSWER]])
def test_turns_alternate_where_the_template_has_no_place_for_two_in_a_row(name: str, turns: Any) -> None:
    with pytest.raises(RowError, match=f"{name} has no place for two messages of role (user|assistant) in a row"):
        text({"messages": turns}, name)
    assert text({"messages": [USER, ANSWER, USER, ANSWER]}, name)


@pytest.mark.parametrize(
    ("name", "end"),
    [("chatml", {2}), ("qwen", {2}), ("plain", {2}), ("### {{ messages[1].content }}\n", set())],
)
def test_the_control_token_that_ends_an_answer(tmp_path: Path, name: str, end: set[int]) -> None:
    smollm2 = tokenizer("smollm2")
    if "{{" in name:
        (tmp_path / "mine.jinja").write_text(name)
        name = str(tmp_path / "mine.jinja")
    assert turn_ends(ChatTemplate(*find_template(name, smollm2), smollm2), smollm2) == end


def test_tool_calls_in_each_form_that_templates_expect() -> None:
    """Arguments as an object with tojson, as JSON text without, and a content that must be null."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}
    row = normalise({"messages": [user, answer]})
    head = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
    for body in (
        "{{ m.tool_calls[0].function.name + m.tool_calls[0].function.arguments | tojson }}",
        "{{ m.tool_calls[0].function.name + m.tool_calls[0].function.arguments }}",
        "{{ raise_exception('null') if m.content is not none }}"
        "{{ m.tool_calls[0].function.name ~ m.tool_calls[0].function.arguments }}",
    ):
        source = head + "{% generation %}" + body + "{% endgeneration %}{% endif %}{% endfor %}"
        assert ChatTemplate("mine", source, tokenizer("smollm2")).render(row).text == 'af{"x": 1}', body


def test_a_block_that_the_template_changes_afterwards_is_refused() -> None:
    source = (
        "{% set out %}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}{% endset %}{{ out | length }}: {{ out }}"
    )
    row = normalise({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    with pytest.raises(RowError, match="modifies the text of its generation blocks; put the tags around its final"):
        ChatTemplate("mine", source, tokenizer("smollm2")).render(row)
