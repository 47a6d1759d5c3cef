"""tools/data.py as users call it, and what it warns of."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from assets import asset

from megalite.data.chat import ChatTemplate, find_template
from megalite.data.instructions import Options, Report, examples
from megalite.data.packing import Conversations
from megalite.data.survey import efficiency, histogram, marked, survey, warnings
from megalite.data.tokenizer import load_tokenizer

TOOL = Path(__file__).parents[3] / "tools" / "data.py"
SMOLLM2, MISTRAL = "smollm2", "mistral-v1/tokenizer.model"


def row(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def told(tmp_path: Path, rows: list[Any], which: str, source: str, seq_len: int = 64) -> list[str]:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), "utf-8")
    tokenizer, report = load_tokenizer(asset(which)), Report()
    template = ChatTemplate("mine", source, tokenizer)
    found = list(examples(path, tokenizer, template, Options(bad_rows="skip"), report))
    return list(warnings(survey(found, tokenizer, template, seq_len), report, tokenizer, seq_len, "escape"))


def built_in(name: str, which: str) -> str:
    return find_template(name, load_tokenizer(asset(which)))[1]


TURNS = "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
TAIL = "{% endgeneration %}{% elif m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("rows", "which", "source", "expected"),
    [
        ([row("q", "a")], MISTRAL, TURNS + "</s>" + TAIL, []),
        ([row("q", "a")], MISTRAL, TURNS + TAIL, ["1 rows end their last answer without a control token"]),
        (
            [row("q", "a")],
            MISTRAL,
            "<s><s>" + TURNS + "</s>" + TAIL,
            ["1 rows have the beginning-of-sequence token twice"],
        ),
        (
            [{"messages": [{"role": "system", "content": "quiet"}, *row("q", "a")["messages"]]}],
            MISTRAL,
            TURNS + "</s>" + TAIL,
            ["skipped 1 bad rows"],
        ),
        (
            [row("q", "a", tools=[{"name": "weather"}])],
            MISTRAL,
            TURNS + "</s>" + TAIL,
            ["does not show the tools of 1 rows"],
        ),
        ([row("q", "a")], MISTRAL, TURNS + "</s><|im_end|>" + TAIL, ["the template writes <|im_end|>", "1 rows end"]),
        ([row("q", "a")], SMOLLM2, built_in("chatml", SMOLLM2), ["pad and end-of-sequence are one token"]),
        (
            [row("q " * 99, "a")],
            MISTRAL,
            TURNS + "</s>" + TAIL,
            ["1 rows are longer", "1 rows have no trained token left"],
        ),
        (
            [row("</s>", "a"), 5],
            MISTRAL,
            TURNS + "</s>" + TAIL,
            ["skipped 1 bad rows", "1 rows hold 1 control strings"],
        ),
        ([row("q", ""), row("q", "a")], MISTRAL, TURNS + TAIL, ["skipped 1 bad rows", "1 rows end"]),
    ],
)
def test_warnings(tmp_path: Path, rows: list[Any], which: str, source: str, expected: list[str]) -> None:
    found = told(tmp_path, rows, which, source)
    assert len(found) == len(expected), found
    for line, part in zip(found, expected):
        assert part in line


def test_histogram_and_efficiency() -> None:
    assert [line.split() for line in histogram([1, 2, 3, 4, 4, 9])] == [
        ["1-1", "1", "#" * 14],
        ["2-2", "1", "#" * 14],
        ["3-4", "3", "#" * 40],
        ["5-8", "0"],
        ["9-16", "1", "#" * 14],
    ]
    assert efficiency([5, 5, 9, 100], 8) == (3, 1.0)


def test_marked_text_is_the_text(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(row("Bell\x1b[31m?", "Ding 🧑‍🚀\n dong")) + "\n", "utf-8")
    tokenizer = load_tokenizer(asset(MISTRAL))
    template = ChatTemplate(*find_template("plain", tokenizer), tokenizer)
    (example,) = examples(path, tokenizer, template, Options(), Report())
    assert marked(example, "[", "]") == "<s>User: Bell\\x1b[31m?\nAssistant:[ Ding 🧑‍🚀\n dong</s>]\n"


def tool(*argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, argv)], capture_output=True, text=True, check=False)


def test_command_line(tmp_path: Path) -> None:
    chats, prefix = tmp_path / "chats.jsonl", tmp_path / "out" / "chats"
    chats.write_text(json.dumps(row("one", "two")) + "\n{}\n", "utf-8")
    common = (chats, "--tokenizer", asset(SMOLLM2))
    result = tool("inspect-sft", *common, "--seq-len", 32)
    assert result.returncode == 0, result
    assert "<|im_start|>assistant\n⟦two<|im_end|>⟧\n" in result.stdout
    assert "1 messages rows by template chat_template.jinja: 34 tokens, 5.9% trained" in result.stdout
    assert "warning: skipped 1 bad rows" in result.stdout
    result = tool("sft", *common, "--output-prefix", prefix)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {chats}:2: has none of the keys")
    assert list(prefix.parent.iterdir()) == []
    result = tool("sft", *common, "--output-prefix", prefix, "--bad-rows", "skip")
    assert result.returncode == 0, result
    assert f"train on it with data.sft={prefix}" in result.stdout
    assert "skipped 1 bad rows" in result.stderr
    made = Conversations(prefix)
    assert made.lengths.tolist() == [34]
    assert [made.table[w] for w in made.weights[0]].count(1) == 2
    result = tool("sft", *common, "--output-prefix", prefix)
    assert (result.returncode, "exists; pass --overwrite" in result.stderr) == (2, True)
    for argv, message in (
        (("inspect-sft", *common, "--template", "x"), "no chat template x"),
        (("inspect-sft", tmp_path / "no.jsonl", "--tokenizer", asset(SMOLLM2)), "no such file"),
        (("inspect-sft", *common[:2], tmp_path), "holds neither a tokenizer.json nor a .model"),
    ):
        result = tool(*argv)
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
        assert message in result.stderr
