"""Random variations of the files in a tokenizer folder are read as AutoTokenizer reads them."""

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import transformers
from campaign import rounds
from tokenizer_folders import TEXTS, make_folder, opened
from transformers.utils.chat_template_utils import render_jinja_template

from megalite.data.instructions import Example, Options, Report, build_example
from megalite.text.chat import ChatTemplate, find_template
from megalite.text.controls import controls_of
from megalite.text.tokenizer import Tokenizer

CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
    {
        "messages": [
            {"role": "user", "content": "  two lines\n\nwith 42 words"},
            {"role": "assistant", "content": "naïve\n\n  answer 床前明月光 "},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "That is all."},
        ],
        "tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}],
    },
]


def compare_tokenizers(ours: Tokenizer, theirs: Any) -> None:
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
    if [path.name for path in ours.path.parent.iterdir()] == [ours.path.name]:
        return  # special tokens go by their usual names where a file lies alone
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.named == theirs.special_tokens_map
    assert ours.vocab_size == 1 + max(theirs.get_vocab().values())
    whole = theirs("a")["input_ids"]
    assert list(ours.prefix) == whole[: len(ours.prefix)]


def compare_chat(ours: Tokenizer, theirs: Any, row: dict[str, Any]) -> str:
    messages, tools = row["messages"], row.get("tools")
    try:
        text = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
    except (ValueError, transformers.utils.chat_template_utils.jinja2.TemplateError) as error:
        with pytest.raises(ValueError, match="template"):
            read(ours, row)
        return f"no template: {type(error).__name__}"
    try:
        found = read(ours, row)
    except ValueError as error:
        return f"refused: {str(error).partition(': ')[2][:40]}"
    assert found.text == text
    assert found.encoding.ids == theirs(text, add_special_tokens=False)["input_ids"]
    compare_mask(found, theirs, messages, tools)
    return "equal"


def read(ours: Tokenizer, row: dict[str, Any]) -> Example:
    template = ChatTemplate(*find_template(None, ours), ours)
    return build_example("row", row, ours, template, Options(), Report(), controls_of(ours))


def compare_mask(found: Example, theirs: Any, messages: list[Any], tools: Any) -> None:
    """Exactly the tokens of answers are trained; tokens across a border may be either."""
    texts, indices = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=theirs.get_chat_template(tools=tools),
        return_assistant_tokens_mask=True,
        add_generation_prompt=False,
        continue_final_message=False,
        **theirs.special_tokens_map,
    )
    assert texts == [found.text]
    # a post-processor would trim the characters of tokens
    theirs.backend_tokenizer.post_processor = None
    offsets = theirs(found.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for (start, stop), weight in zip(offsets, found.weights, strict=True):
        inside = found.text[start:stop].strip() or found.text[start:stop]
        start = found.text.index(inside, start)
        stop = start + len(inside)
        trained = [first <= start and stop <= last for first, last in indices[0]]
        outside = all(stop <= first or last <= start for first, last in indices[0])
        if start < stop and (any(trained) or outside):
            assert (weight > 0) == any(trained), (inside, start, stop)


def one(folder: Path, seed: int) -> str:
    draw = random.Random(seed)
    make_folder(folder, draw)
    ours, refusal = opened(folder)
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        return f"transformers cannot open it: {type(error).__name__}"
    if ours is None:
        return refusal
    compare_tokenizers(ours, theirs)
    return "; ".join(sorted({compare_chat(ours, theirs, row) for row in CHATS}))


@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore")
def test_folders_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    count: Counter[str] = Counter()
    for seed in range(rounds(24, 250)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        try:
            count[one(folder, seed)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        shutil.rmtree(folder)
    print("tokenizer folders:", ", ".join(f"{number} {what}" for what, number in count.most_common()))
    assert count["equal"] > sum(count.values()) / 3
