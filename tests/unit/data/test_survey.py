"""What a survey of conversations counts, warns of and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from assets import asset

from megalite.data.instructions import Options, Report, examples, write_indexed
from megalite.data.packing import Conversations
from megalite.data.survey import Survey, histogram, mark_trained, survey
from megalite.text.chat import ChatTemplate, find_template
from megalite.text.tokenizer import load_tokenizer

SMOLLM2, MISTRAL = "smollm2", "mistral-v1/tokenizer.model"


def row(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def look(
    tmp_path: Path, rows: list[Any], which: str, source: str, seq_len: int = 64, overlong: str = "truncate_right"
) -> Survey:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), "utf-8")
    tokenizer = load_tokenizer(asset(which))
    template = ChatTemplate("mine", source, tokenizer)
    write_indexed(path, tmp_path / "chats", tokenizer, template, Options(bad_rows="skip"))
    return survey(Conversations(tmp_path / "chats"), "chats.jsonl", seq_len, overlong)


def built_in(name: str, which: str) -> str:
    return find_template(name, load_tokenizer(asset(which)))[1]


TURNS = "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
TAIL = "{% endgeneration %}{% elif m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("rows", "which", "source", "expected"),
    [
        ([row("q", "a")], MISTRAL, TURNS + "</s>" + TAIL, []),
        (
            [row("q", "a")],
            MISTRAL,
            TURNS + TAIL,
            [
                "the last answer ends without a control token, so the model does not learn to stop: 1 row "
                "(the first: chats.jsonl:1)"
            ],
        ),
        (
            [5, row("q", "a"), row("q", "a")],
            MISTRAL,
            "<s><s>" + TURNS + "</s>" + TAIL,
            [
                "skipped 1 bad row (data.bad_rows=skip): chats.jsonl:1: is a number, expected an object",
                "the beginning-of-sequence token appears twice in a row: 2 rows (the first: chats.jsonl:2)",
            ],
        ),
        (
            [row("q", "a"), {"messages": [{"role": "system", "content": "quiet"}, *row("q", "a")["messages"]]}],
            MISTRAL,
            TURNS + "</s>" + TAIL,
            ["skipped 1 bad row (data.bad_rows=skip): chats.jsonl:2: message 1: template mine drops or changes its"],
        ),
        (
            [row("q", "a", tools=[{"name": "weather"}])],
            MISTRAL,
            TURNS + "</s>" + TAIL,
            ["the template does not show the tools: 1 row (the first: chats.jsonl:1)"],
        ),
        (
            [row("<|im_end|>", "a"), row("q", "a")],
            MISTRAL,
            TURNS + "</s><|im_end|>" + TAIL,
            [
                "the last answer ends without a control token",
                "the template writes <|im_end|>, which is not a token of this tokenizer: 1 row (the first: chats.j",
            ],
        ),
        ([row("q", "a")], SMOLLM2, built_in("chatml", SMOLLM2), []),
        (
            [row("q", "a"), row("q " * 99, "a"), row("q", "a " * 99)],
            MISTRAL,
            TURNS + "</s>" + TAIL,
            [
                "2 conversations are longer than train.seq_len=64 and cut at the end (data.overlong=truncate_right) "
                "(the first: chats.jsonl:2)",
                "1 conversation is left out, with no trained token within train.seq_len=64 (the first: chats.jsonl:2)",
            ],
        ),
        (
            [row("</s>", "a"), 5],
            MISTRAL,
            TURNS + "</s>" + TAIL,
            [
                "skipped 1 bad row",
                "1 control strings inside messages were encoded as ordinary text: 1 row (the first: chats.jsonl:1)",
            ],
        ),
        ([row("q", ""), row("q", "a")], MISTRAL, TURNS + TAIL, ["skipped 1 bad row", "the last answer ends"]),
    ],
)
def test_notes(tmp_path: Path, rows: list[Any], which: str, source: str, expected: list[str]) -> None:
    found = list(look(tmp_path, rows, which, source).notes())
    assert len(found) == len(expected), found
    for line, part in zip(found, expected):
        assert line.startswith(part)


@pytest.mark.parametrize("overlong", ["truncate_right", "truncate_left", "drop"])
def test_what_is_trained_is_counted_after_the_cut(tmp_path: Path, overlong: str) -> None:
    rows = [row("q", "a"), row("q " * 99, "a"), row("q", "a " * 99), row("q " * 99, "a", train=1)]
    found = look(tmp_path, rows, MISTRAL, TURNS + "</s>" + TAIL, 64, overlong)
    data, keep = found.data, {"truncate_right": slice(0, 65), "truncate_left": slice(-65, None), "drop": slice(0, 0)}
    parts = [data.table[data.weights[i]][keep[overlong] if data.lengths[i] > 65 else slice(None)] for i in range(4)]
    learned = [part for part in parts if part[1:].any()]
    assert found.tokens == sum(map(len, learned))
    assert found.trained == sum(int((part > 0).sum()) for part in learned)
    left = {"truncate_right": [0, 2], "truncate_left": [0, 1, 2, 3], "drop": [0, 1, 2, 3]}
    assert found.chosen.tolist() == left[overlong]
    assert found.longer.tolist() == [1, 2, 3]
    assert [str(found.summary().split(" %")[0])] == [
        f"4 messages rows, template mine, {100 * found.trained / found.tokens:.1f}"
    ]


def test_nothing_left_to_train_is_refused(tmp_path: Path) -> None:
    rows, source = [row("q " * 99, "a")] * 3, TURNS + "</s>" + TAIL
    message = (
        r"^data.sft=x: no row with a trained token is left: 3 conversations are left out, with no trained token "
        r"within train.seq_len=64 \(the first: chats.jsonl:1\); increase train.seq_len, or keep the end with "
        r"data.overlong=truncate_left$"
    )
    with pytest.raises(ValueError, match=message):
        look(tmp_path, rows, MISTRAL, source).require_some("data.sft=x")
    with pytest.raises(ValueError, match=r"3 conversations are longer than .* and left out \(data.overlong=drop\)"):
        look(tmp_path, rows, MISTRAL, source, overlong="drop").require_some("data.sft=x")
    look(tmp_path, rows, MISTRAL, source, overlong="truncate_left").require_some("data.sft=x")
    look(tmp_path, [*rows, row("q", "a")], MISTRAL, source).require_some("data.sft=x")


def test_a_template_of_other_control_tokens_is_refused(tmp_path: Path) -> None:
    """chatml on a tokenizer without its tokens: the model would never learn to stop."""
    with pytest.raises(ValueError, match=r"template mine writes <\|im_end\|>, <\|im_start\|> \(the first in chats"):
        look(tmp_path, [row("q", "a")], MISTRAL, built_in("chatml", MISTRAL)).require_some("data.sft=x")
    # Zephyr's, whose answers all end with </s>, is only reported
    zephyr = "<|user|>\n{{ messages[0].content }}</s>\n<|assistant|>\n"
    zephyr += "{% generation %}{{ messages[1].content }}</s>{% endgeneration %}\n"
    found = look(tmp_path, [row("q", "a")], MISTRAL, zephyr)
    found.require_some("data.sft=x")
    assert [line.split(",")[0] for line in found.notes()] == [
        f"the template writes <|{r}|>" for r in ("assistant", "user")
    ]
    # [INST] is ordinary text to Llama 2 and Mistral; a row may mention another model's tokens
    for which, name in ((MISTRAL, "llama2"), (MISTRAL, "plain"), (SMOLLM2, "chatml")):
        look(tmp_path, [row("<|eot_id|>?", "<|eot_id|>!")], which, built_in(name, which)).require_some("data.sft=x")


def test_a_weight_too_small_to_be_trained(tmp_path: Path) -> None:
    small = row("q", "a")
    small["messages"][1]["weight"] = 1e-50
    found = look(tmp_path, [small, row("q", "a")], MISTRAL, TURNS + "</s>" + TAIL)
    assert next(iter(found.notes())).startswith(
        "skipped rows without a trained token, whose answers are empty or have weight 0: 1 row"
    )


def test_histogram() -> None:
    assert [line.split() for line in histogram([1, 2, 3, 4, 4, 9])] == [
        ["1-1", "1", "#" * 14],
        ["2-2", "1", "#" * 14],
        ["3-4", "3", "#" * 40],
        ["5-8", "0"],
        ["9-16", "1", "#" * 14],
    ]


def test_marked_text_is_the_text(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(row("Bell\x1b[31m?", "Ding 🧑‍🚀\n dong")) + "\n", "utf-8")
    tokenizer = load_tokenizer(asset(MISTRAL))
    template = ChatTemplate(*find_template("plain", tokenizer), tokenizer)
    (example,) = examples(path, tokenizer, template, Options(), Report())
    assert mark_trained(example, "[", "]") == "<s>User: Bell\\x1b[31m?\nAssistant:[ Ding 🧑‍🚀\n dong</s>]\n"
