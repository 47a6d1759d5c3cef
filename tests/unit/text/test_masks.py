"""Which tokens are trained: golden files read by eye, and transformers' own masks on the same texts."""

import json
import os
import shutil
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from assets import asset

from megalite.data.instructions import Options, Report, examples
from megalite.text.chat import ChatTemplate, Rendered, Span, control_pattern, find_template
from megalite.text.controls import escape_controls
from megalite.text.conversations import normalise, read_rows
from megalite.text.masks import require_trained, token_weights, weighted_spans
from megalite.text.messages import Conversation, RowError
from megalite.text.tokenizer import Encoding, Tokenizer, load_tokenizer

GOLDEN = Path(__file__).with_name("golden")
TOKENIZERS = {"smollm2": "smollm2", "deepseek": "deepseek/tokenizer.json", "mistral-v3": "mistral-v3/tokenizer.model"}
ROWS: dict[str, Any] = json.loads((GOLDEN / "conversations.json").read_text("utf-8"))
MASKS: dict[str, Any] = json.loads((GOLDEN / "masks.json").read_text("utf-8"))
TURNS = ("user", "assistant") * 2
CASES = [(which, name) for which in TOKENIZERS for name in ROWS]


@cache
def tokenizer(which: str) -> Tokenizer:
    return load_tokenizer(asset(TOKENIZERS[which]))


def template(name: str | None, which: str) -> ChatTemplate:
    return ChatTemplate(*find_template(name, tokenizer(which)), tokenizer(which))


def made(row: Any, chat: ChatTemplate, which: str, train_on: str = "assistant") -> tuple[str, Encoding, list[float]]:
    conversation = normalise(row)
    rendered = chat.render(conversation)
    encoding = tokenizer(which).encode_chat(rendered.text)
    spans = weighted_spans(conversation, rendered, train_on)
    return rendered.text, encoding, token_weights(rendered.text, encoding, spans).tolist()


def trained_text(row: Any, chat: ChatTemplate, which: str, train_on: str = "assistant") -> str:
    """The characters of all trained tokens; bytes of one character once."""
    text, encoding, weights = made(row, chat, which, train_on)
    return "".join(text[a:b] for a, b in sorted({span for span, weight in zip(encoding.spans, weights) if weight}))


@pytest.mark.parametrize(("which", "name"), CASES)
def test_masks_are_the_golden_ones(which: str, name: str) -> None:
    golden = MASKS[which][name]
    own = golden["template"] == "chat_template.jinja"
    _, encoding, weights = made(ROWS[name], template(None if own else golden["template"], which), which)
    assert " ".join(map(str, encoding.ids)) == golden["ids"]
    assert " ".join(f"{weight:g}" for weight in weights) == golden["weights"]


@cache
def theirs(which: str, folder: Path) -> Any:
    """The same tokenizer in transformers, which knows of our code nothing but the file."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    names = {
        f"{kind}_token": tokenizer(which).control_string(number)
        for kind, number in (("bos", tokenizer(which).bos_id), ("eos", tokenizer(which).eos_id))
    }
    if which == "mistral-v3":
        shutil.copy(asset(TOKENIZERS[which]), folder / "tokenizer.model")
        return transformers.LlamaTokenizer.from_pretrained(folder, legacy=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer(which).path), **names)


def expected(conversation: Conversation, source: str, oracle: Any) -> tuple[list[int], list[int]]:
    found = oracle.apply_chat_template(
        conversation.messages,
        tools=conversation.tools,
        chat_template=source,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return found["input_ids"], found["assistant_masks"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mistral")


# transformers' conversion of this model merges runs of spaces unlike sentencepiece itself
COMPARED = [case for case in CASES if case != ("mistral-v3", "code")]


@pytest.mark.parametrize(("which", "name"), COMPARED)
def test_masks_equal_those_of_transformers(which: str, name: str, folder: Path) -> None:
    golden = MASKS[which][name]
    own = golden["template"] == "chat_template.jinja"
    source = template(None if own else golden["template"], which).source
    if own:  # theirs needs the spans that ours finds without
        said = "message['content'] + '<|im_end|>'"
        assert said in source
        marked = "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}{{ "
        marked += said + " }}{% endgeneration %}{{ '\n' }}{% else %}{{'<|im_start|>'"
        source = source.replace("{{'<|im_start|>'", marked, 1)
        source = source.replace("+ '\n'}}{% endfor %}", "+ '\n'}}{% endif %}{% endfor %}", 1)
    conversation = normalise(ROWS[name])
    ids, mask = expected(conversation, source, theirs(which, folder))
    weights = [float(weight) for weight in golden["weights"].split()]
    assert ids == [int(i) for i in golden["ids"].split()]
    if name == "weights":  # of which transformers knows nothing
        assert {weight for weight, theirs_ in zip(weights, mask) if theirs_} == {0, 0.5, 1}
        mask = [bool(m) and weight > 0 for m, weight in zip(mask, weights)]
    differ = [i for i, (weight, m) in enumerate(zip(weights, mask)) if (weight > 0) != bool(m)]
    if (which, name) == ("smollm2", "spaces"):
        # "\n  " is one token of the header and of the answer: theirs counts it, ours does not
        (i,) = differ
        assert tokenizer(which).decode(ids[i : i + 1]) == "\n "
    else:
        assert not differ


@pytest.mark.parametrize(
    ("which", "name"),
    [
        ("smollm2", "chatml"),
        ("smollm2", "qwen"),
        ("deepseek", "alpaca"),
        ("deepseek", "llama2"),
        ("mistral-v3", "plain"),
    ],
)
def test_real_rows_equal_those_of_transformers(which: str, name: str, folder: Path) -> None:
    chat, oracle, compared, other = template(name, which), theirs(which, folder), 0, 0
    for file in ("alpaca_en_demo.json", "alpaca_zh_demo.json", "glaive_toolcall_en_demo.json"):
        for row in islice(read_rows(asset(f"instructions/{file}")), 25):
            conversation = normalise(row.value)
            if "tool" in file and name not in ("chatml", "qwen", "plain"):
                continue
            _, encoding, weights = made(row.value, chat, which)
            ids, mask = expected(conversation, chat.source, oracle)
            if which == "mistral-v3" and encoding.ids != ids:
                other += 1  # transformers' conversion has merges that sentencepiece, whose model it is, has not
                continue
            assert encoding.ids == ids, row.where
            assert [weight > 0 for weight in weights] == [bool(m) for m in mask], row.where
            compared += 1
    assert compared + other == (75 if name in ("chatml", "qwen", "plain") else 50)
    assert other <= 10


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
    # the prompt that generation uses is how the conversation goes on
    assert rendered.text.startswith(chat.prompt(normalise(row).messages[:3]))


def test_generation_in_a_macro_and_a_set_block() -> None:
    """Spans stand in the text itself, so that no way of building the text can lose them."""
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
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "writes more before what the assistant"),
        ("{% for m in messages|reverse %}{{ m.content }}{% endfor %}", "cannot be told from the rest"),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "marks as generation what no message of the assistant says",
        ),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "message 3: .* does not show its content"),
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
        match=r"no chat template beside it .* data\.template name a \.jinja file or one of alpaca",
    ):
        find_template(None, mistral)
    with pytest.raises(ValueError, match=r"no chat template chatlm: name a \.jinja file or one of"):
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


def test_a_token_across_the_border_of_a_span() -> None:
    """Trained only if it lies in the span, but for the whitespace at its beginning."""
    text = "a: b c\n\n d"
    tokens = ["a", ":", " b", " c\n", "\n", " d"]
    ends = np.cumsum([len(token) for token in tokens]).tolist()
    encoding = Encoding(list(range(6)), [(end - len(token), end) for token, end in zip(tokens, ends)])
    assert token_weights(text, encoding, [(3, 6, 2.0)]).tolist() == [0, 0, 2, 0, 0, 0]  # " c\n" goes beyond
    assert token_weights(text, encoding, [(3, 7, 2.0)]).tolist() == [0, 0, 2, 2, 0, 0]
    assert token_weights(text, encoding, [(1, 2, 1.0), (4, 8, 0.5)]).tolist() == [0, 1, 0, 0.5, 0.5, 0]
    # of whitespace alone every character counts
    assert token_weights("\n\n", Encoding([0], [(0, 2)]), [(1, 2, 1.0)]).tolist() == [0]
    # no characters at all: sentencepiece's dummy prefix
    assert token_weights("ab", Encoding([0, 1], [(0, 0), (0, 2)]), [(0, 2, 1.0)]).tolist() == [0, 1]


def test_last_and_weights() -> None:
    conversation = normalise(ROWS["weights"])
    rendered = Rendered("abcdef", [Span(0, 1, 1, 1), Span(2, 3, 3, 3), Span(4, 5, 5, 5)])
    assert weighted_spans(conversation, rendered, "assistant") == [(0, 1, 0.0), (2, 3, 0.5), (4, 5, 1.0)]
    assert weighted_spans(conversation, rendered, "last") == [(4, 5, 1.0)]
    assert weighted_spans(conversation, rendered, "all") == [(0, 6, 1.0)]
    with pytest.raises(RowError, match="no token of it is trained"):
        require_trained(np.array([1.0, 0.0]))


@pytest.mark.parametrize("which", TOKENIZERS)
def test_control_strings_in_a_message(which: str, tmp_path: Path) -> None:
    """Typed by a user, the end of a turn must not end it."""
    eos_id = tokenizer(which).eos_id
    eos = tokenizer(which).control_string(eos_id)
    row = {"messages": [{"role": "user", "content": f"what is {eos}?"}, {"role": "assistant", "content": "an end"}]}
    clean = {"messages": [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "an end"}]}
    (tmp_path / "chats.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(clean) + "\n", "utf-8")
    chat = template("plain", which)
    count = {}
    for mode in ("escape", "warn", "allow"):
        report = Report()
        found = [
            x.encoding.ids.count(eos_id)
            for x in examples(tmp_path / "chats.jsonl", tokenizer(which), chat, Options(control_tokens=mode), report)
        ]
        count[mode] = (found, len(list(report.lines(mode))))
    assert count == {"escape": ([1, 1], 1), "warn": ([2, 1], 1), "allow": ([2, 1], 0)}
    controls = control_pattern(tokenizer(which))
    assert controls is not None
    assert escape_controls({"a": [f"x{eos}y{eos}", 1, None]}, controls.find) == (
        {"a": [f"x{eos[0]}\u200b{eos[1:]}y{eos[0]}\u200b{eos[1:]}", 1, None]},
        2,
    )


def test_bytes_of_a_character_share_its_range() -> None:
    for which in TOKENIZERS:
        text = "⠿a🧑‍🚀é\n中"
        encoding = tokenizer(which).encode_chat(text)
        covered = sorted(set(encoding.spans))
        assert "".join(text[start:stop] for start, stop in covered) == text, which
        assert encoding.ids == tokenizer(which).encode(text)
