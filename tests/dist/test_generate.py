"""Generation from a checkpoint by real ranks, at other layouts than it was saved at."""

import json
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import REPOSITORY, Ranks, run_ranks, save_untrained

from megalite.data.corpus import train_tokenizer

Settings = Callable[..., list[str]]
CORPUS = REPOSITORY / "examples" / "corpus"
PROMPTS = ["In the beginning", "床前明月光，疑", "And"]


def tool(name: str, argv: list[str]) -> int:
    """What `python tools/NAME ...` does in each process."""
    path = REPOSITORY / "tools" / name
    sys.argv = [str(path), *argv]
    runpy.run_path(str(path), run_name="__main__")
    raise AssertionError("the tool ends the process")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> Path:
    """An untrained model saved by two ranks, with weights large enough to have opinions."""
    folder = tmp_path_factory.mktemp("run") / "run"
    more = ("model.vocab_size=400", "model.init_std=0.3", "model.sliding_window=12", "parallel.tp=2")
    run_ranks(2, save_untrained, settings(folder, *more))
    texts = [json.loads(line)["text"] for name in ("kjv", "poems") for line in (CORPUS / f"{name}.jsonl").open()][::20]
    (folder / "tokenizer.model").write_bytes(train_tokenizer(texts, 400))
    return folder


def test_every_layout_says_the_same(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"prompt": each}) + "\n" for each in PROMPTS[1:]))
    argv = [str(run_dir), "--prompt", PROMPTS[0], "--prompts", str(tmp_path / "more.jsonl")]
    argv += ["--max-new-tokens", "24", "--temperature", "0", "--device", "cpu"]
    one = run_ranks(1, tool, "generate.py", argv)
    for prompt in PROMPTS:
        assert prompt in one.out[0]
    assert len(one.out[0]) > 2 * sum(map(len, PROMPTS))
    for layout in (["--tp", "2", "--pp", "2"], []):
        four = run_ranks(4, tool, "generate.py", [*argv, *layout])
        assert four.out == [*one.out, "", "", ""]


def test_a_mistake_is_told_once(run_dir: Path) -> None:
    for argv, message in (
        (
            ["--tp", "3", "--prompt", "x"],
            "tp 3 x pp 1 = 3, but the world size is 2; start it with torchrun --nproc_per_node 3",
        ),
        (["--tp", "2", "--prompt", "x"], "tp 2 x pp 1 = 2, but the world size is 3"),
    ):
        size = 2 if "3" in argv else 3
        with Ranks(size, tool, "generate.py", [str(run_dir), *argv]) as ranks:
            ended = ranks.wait()
        assert set(ended.codes) <= {1, 2}
        assert ended.codes[0] == 2
        (line,) = "".join(ended.err).splitlines()
        assert line.startswith("error: ")
        assert message in line


def test_every_layout_measures_the_same(run_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} and", "choices": ["God", "the man", "月"], "label": i % 3} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [{"prompt": row["prompt"], "answer": "x"} for row in rows]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (tmp_path / "text.txt").write_text("In the beginning\n\nGod created the heaven\n\n床前明月光\n")
    shots = ["--shots", "2", "--seed", "3"]
    for verb, data, more in (
        ("loss", "text.txt", ["--seq-len", "8"]),
        ("choices", "rows.jsonl", shots),
        ("answers", "questions.jsonl", [*shots, "--max-new-tokens", "6", "--batch-size", "3"]),
    ):
        figures = []
        for ranks in (1, 4):
            target = tmp_path / f"{verb}-{ranks}.json"
            argv = [verb, str(run_dir), str(tmp_path / data), *more, "--device", "cpu", "--json", str(target)]
            ended = run_ranks(ranks, tool, "evaluate.py", argv + ["--tp", "2", "--pp", "2"] * (ranks > 1))
            assert ended.out[1:] == [""] * (ranks - 1)
            figures.append(json.loads(target.read_text()))
        one, four = figures
        assert one.keys() == four.keys()
        for key in one.keys() - {"rows"}:
            assert four[key] == (pytest.approx(one[key], rel=1e-5) if isinstance(one[key], float) else one[key]), key
        if verb == "loss":
            nats = one["loss"] * one["tokens"]
            assert one["perplexity"] == pytest.approx(math.exp(one["loss"]))
            text_bytes = sum(
                len(text.encode()) for text in ("In the beginning", "God created the heaven", "床前明月光")
            )
            assert one["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes)
        else:
            assert (one["shots"], one["tested"], len(one["rows"])) == (2, 4, 4)
        if verb == "answers":
            assert [row["said"] for row in four["rows"]] == [row["said"] for row in one["rows"]]
        if verb == "choices":
            for mine, theirs in zip(four["rows"], one["rows"], strict=True):
                assert mine["log_likelihoods"] == pytest.approx(theirs["log_likelihoods"], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("generate.py", ["--prompt", "x", "--top-p", "2"], "top_p=2.0 must be greater than 0"),
        ("generate.py", ["--prompt", "x", "--chat", "y"], "cannot be combined with --prompt or --prompts"),
        ("generate.py", ["--chat", "y"], "has no chat template next to it"),
        ("generate.py", ["--prompts", "{tmp}/none.txt"], "none.txt"),
        ("generate.py", ["--prompts", "{tmp}/bad.jsonl"], 'bad.jsonl:2: expected a JSON object with a text "prompt"'),
        ("evaluate.py", ["{tmp}/bad.jsonl", "--shots", "9"], 'bad.jsonl:1: expected {"prompt": text, "choices"'),
    ],
)
def test_a_wrong_question_is_told_in_one_line(
    name: str, argv: list[str], message: str, run_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "fine"}\n{"text": "not"}\n')
    argv = [argument.format(tmp=tmp_path) for argument in argv]
    with Ranks(1, tool, name, [*["choices"] * (name == "evaluate.py"), str(run_dir), *argv]) as ranks:
        ended = ranks.wait()
    assert ended.codes == [2]
    (line,) = ended.err[0].splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_lines_that_are_typed_are_continued(run_dir: Path, tmp_path: Path) -> None:
    """Rank 0 reads, all continue; the end of input ends all."""
    (tmp_path / "typed").write_text("In the\n床前\n")
    argv = [str(run_dir), "--max-new-tokens", "5", "--temperature", "0", "--device", "cpu"]
    one = run_ranks(1, typed, tmp_path / "typed", argv)
    two = run_ranks(2, typed, tmp_path / "typed", [*argv, "--pp", "2"])
    assert len(one.out[0].splitlines()) >= 2
    assert two.out == [*one.out, ""]


def typed(lines: Path, argv: list[str]) -> int:
    """The tool with `lines` as the standard input of each rank."""
    sys.stdin = lines.open(encoding="utf-8")
    return tool("generate.py", argv)
