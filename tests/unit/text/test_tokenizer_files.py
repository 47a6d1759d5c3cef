"""The other files of a tokenizer folder are read as by AutoTokenizer, or refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from assets import asset

from megalite.data.instructions import Example, Options, Report, build_example
from megalite.text.chat import ChatTemplate, find_template
from megalite.text.controls import controls_of
from megalite.text.tokenizer import load_tokenizer
from megalite.text.tokenizer_files import copy_files

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = "{{ tools | tojson }}" + CHATML
ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
WITH_TOOLS = {**ROW, "tools": [{"type": "function", "function": {"name": "get", "parameters": {}}}]}
Edit = Callable[[dict[str, Any]], object]


def smollm2(
    folder: Path, tokenizer: Edit | None = None, config: Edit | None = None, template: str | None = CHATML
) -> Path:
    """A copy of SmolLM2's tokenizer folder, edited."""
    for name, edit in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        content = json.loads((asset("smollm2") / name).read_text("utf-8"))
        if edit is not None:
            edit(content)
        (folder / name).write_text(json.dumps(content), "utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    return folder


def read(folder: Path, row: dict[str, Any]) -> Example:
    tokenizer = load_tokenizer(folder)
    template = ChatTemplate(*find_template(None, tokenizer), tokenizer)
    return build_example("row", row, tokenizer, template, Options(), Report(), controls_of(tokenizer))


def check(folder: Path, row: dict[str, Any]) -> None:
    """Text, ids, mask and special tokens are those of transformers."""
    theirs, found = transformers.AutoTokenizer.from_pretrained(folder), read(folder, row)
    messages, tools = row["messages"], row.get("tools")
    asked = theirs.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert found.text == theirs.apply_chat_template(messages, tools=tools, tokenize=False)
    assert found.encoding.ids == asked["input_ids"]
    assert [int(weight > 0) for weight in found.weights] == asked["assistant_masks"]
    ours = load_tokenizer(folder)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)


def without(content: str) -> Edit:
    return lambda t: t.update(added_tokens=[each for each in t["added_tokens"] if each["content"] != content])


def test_an_end_token_that_only_the_config_names(tmp_path: Path) -> None:
    own = CHATML.replace("<|im_end|>", "{{ eos_token }}")
    for template in (CHATML, own):
        check(smollm2(tmp_path, without("<|im_end|>"), template=template), ROW)
        assert read(tmp_path, ROW).encoding.ids[-1] == 2


def test_a_token_that_only_the_config_adds(tmp_path: Path) -> None:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    token = {"content": "<|tool|>", "special": True, **flags}
    template = CHATML.replace("{{ m.role }}\n", "{{ m.role }}<|tool|>\n")
    check(smollm2(tmp_path, None, lambda c: c.update(added_tokens_decoder={"49152": token}), template), ROW)
    assert read(tmp_path, ROW).encoding.ids.count(49152) == 2
    assert load_tokenizer(tmp_path).vocab_size == 49153


def test_an_end_token_in_the_map_of_special_tokens(tmp_path: Path) -> None:
    smollm2(tmp_path, None, lambda c: c.pop("eos_token"))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    check(tmp_path, ROW)
    assert load_tokenizer(tmp_path).eos_id == 2


@pytest.mark.parametrize("row", [ROW, WITH_TOOLS])
def test_the_template_for_tools(tmp_path: Path, row: dict[str, Any]) -> None:
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TOOLS}]
    check(smollm2(tmp_path, None, lambda c: c.update(chat_template=named), template=None), row)
    # a separate file takes precedence over the config
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("files: " + TOOLS)
    (tmp_path / "chat_template.jinja").write_text("  \n" + CHATML + "\n  \n")
    check(tmp_path, row)


def test_whitespace_tokens_of_an_answer_are_trained_whatever_a_post_processor_trims(tmp_path: Path) -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    roberta = {"type": "RobertaProcessing", "sep": ["<|im_end|>", 2], "cls": ["<|im_start|>", 1]}
    for post in (byte_level, {**roberta, "trim_offsets": True, "add_prefix_space": False}):
        smollm2(tmp_path, lambda t, post=post: t.update(post_processor=post))
        answer = {"role": "assistant", "content": "one\n\n\n   two "}
        found = read(tmp_path, {"messages": [ROW["messages"][0], answer]})
        plain = load_tokenizer(asset("smollm2")).encode("one\n\n\n   two <|im_end|>")
        assert [i for i, weight in zip(found.encoding.ids, found.weights) if weight] == plain


def test_an_end_token_that_includes_the_spaces_around_it_is_trained(tmp_path: Path) -> None:
    def strip(tokenizer: dict[str, Any]) -> None:
        for token in tokenizer["added_tokens"]:
            token["rstrip"] = token["lstrip"] = token["content"] == "<|im_end|>"

    found = read(smollm2(tmp_path, strip), ROW)
    assert [i for i, weight in zip(found.encoding.ids, found.weights) if weight][-1] == 2


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: not JSON"),
        ("tokenizer_config.json", "[]", "is a list, expected a JSON object"),
        ("tokenizer_config.json", "[" * 100000, "not JSON"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token is 3, expected the string of a token"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "is not an object with ids as keys"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"1": {"content": 5}}}',
            "added token has an invalid content",
        ),
        ("tokenizer_config.json", '{"extra_special_tokens": 5}', "extra_special_tokens is not a list of tokens"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template is a number, expected text or a list"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "a"}]}', "lacks name or template"),
        ("tokenizer_config.json", '{"tokenizer_class": "BertTokenizer"}', "tokenizer_class=BertTokenizer is not supp"),
        ("added_tokens.json", '{"<a>": "5"}', "is not an id"),
        ("special_tokens_map.json", "nonsense", "not JSON"),
    ],
)
def test_files_that_cannot_be_followed_are_refused_by_name(tmp_path: Path, name: str, text: str, words: str) -> None:
    smollm2(tmp_path, None, lambda c: c.pop("eos_token"), template=None)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_copy_is_the_same_tokenizer_and_can_have_more_tokens(tmp_path: Path) -> None:
    for name in ("from", "to"):
        (tmp_path / name).mkdir()
    smollm2(tmp_path / "from", without("<|im_end|>"), lambda c: c.update(additional_special_tokens=["<x>"]))
    copy_files(tmp_path / "from" / "tokenizer.json", tmp_path / "to", ["<new>", "<newer>"])
    before, after = load_tokenizer(tmp_path / "from"), load_tokenizer(tmp_path / "to")
    assert after.vocab_size == before.vocab_size + 2
    assert after.encode("<x><new><newer> a") == [*before.encode("<x>"), 49153, 49154, *before.encode(" a")]
    assert load_tokenizer(tmp_path / "from", ["<new>", "<newer>"]).encode("<newer>") == [49154]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "to")
    assert theirs("<newer>", add_special_tokens=False)["input_ids"] == [49154]
    assert before.fingerprint != load_tokenizer(tmp_path / "from", ["<new>"]).fingerprint
