"""The training and held-out sets of a run on conversations."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from assets import asset

from megalite.config import Config, DataConfig, ModelConfig, TrainConfig
from megalite.data import instructions
from megalite.data.corpus import Corpus
from megalite.data.sets import DataSets
from megalite.data.tuning import open_conversations
from megalite.text.chat import BUILT_IN
from megalite.text.tokenizer import Tokenizer

SEQ = 32


def config(chats: Path, corpus: Corpus, cache: Path, **data: Any) -> Config:
    values = {"sft": str(chats), "tokenizer": str(corpus.tokenizer), "template": "plain", "cache_dir": str(cache)}
    return Config(model=ModelConfig(), data=DataConfig(**{**values, **data}), train=TrainConfig(seq_len=SEQ))


def sizes(data: DataSets) -> dict[str, int]:
    return {"train": len(data.train.pieces)} | {name: len(each.pieces) for name, each in data.heldout.items()}


def test_samples_are_found_in_the_file(chats: Path, corpus: Corpus, tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = chats.read_text("utf-8").splitlines()
    copy = tmp_path / "copy.jsonl"
    # with an empty line and one that is not a conversation
    copy.write_text("\n".join([lines[0], "", "{}", *lines[1:]]) + "\n", "utf-8")
    settings = {"bad_rows": "skip", "valid_fraction": 0.0, "packing": False}
    data = open_conversations(config(copy, corpus, tmp_path, **settings)).train
    seen = set()
    for sample in range(len(data)):
        name, line = data.describe([sample]).rsplit(":", 1)
        assert name == "row copy.jsonl"
        answer = json.loads(copy.read_text("utf-8").splitlines()[int(line) - 1])["messages"][1]["content"]
        assert answer in tokenizer.decode(data.batch([sample]).tokens[0].tolist())
        seen.add(int(line))
    assert len(seen) == len(data)
    assert data.describe([0, 1]).startswith("rows copy.jsonl:")


def test_open_data(chats: Path, corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "megalite")
    opened = open_conversations(config(chats, corpus, tmp_path))
    assert sizes(opened) == {"train": 28, "valid": 1}
    assert "30 messages rows, template plain" in caplog.text
    assert "longer than train.seq_len=32 and cut at the end" in caplog.text
    assert f"1 conversation is left out, with no trained token within train.seq_len=32 (the first: {chats}:10)" in (
        caplog.text
    )
    assert opened.template == (BUILT_IN / "plain.jinja").read_text("utf-8")
    assert sizes(open_conversations(config(chats, corpus, tmp_path, valid_fraction=0.3))) == {"train": 20, "valid": 9}
    assert sizes(open_conversations(config(chats, corpus, tmp_path, valid_fraction=0.0))) == {"train": 29}
    assert sizes(open_conversations(config(chats, corpus, tmp_path, valid={"x": str(chats)}))) == {"train": 29, "x": 29}
    # the second time the files are found
    made = sorted(tmp_path.glob("sft-*.bin"))
    written = [path.stat().st_mtime_ns for path in made]
    open_conversations(config(chats, corpus, tmp_path))
    assert [path.stat().st_mtime_ns for path in made] == written
    # the same from a prefix
    prefix = str(next(path for path in made if "weights" not in path.name))[: -len(".bin")]
    assert open_conversations(config(chats, corpus, tmp_path, sft=prefix)).fingerprint.startswith("sft-")
    for change, message in (
        ({"train_on": "last"}, "was made with train_on=assistant, data.train_on=last; make it again"),
        ({"template": "chatml"}, "was made with template plain, data.template=chatml; make it again"),
        ({"tokenizer": str(asset("mistral-v1/tokenizer.model"))}, "was made with another tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            open_conversations(config(chats, corpus, tmp_path, **{"sft": prefix, **change}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sft": "none.jsonl"}, "data.sft=none.jsonl: no such file"),
        ({"sft": "none"}, "data.sft=none: none.idx: no such file"),
        ({"tokenizer": None}, "text needs data.tokenizer"),
        ({"template": "chatlm"}, "no chat template chatlm"),
        ({"valid_fraction": 0.99}, "of 29 conversations leaves none to train on"),
    ],
)
def test_mistakes(chats: Path, corpus: Corpus, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_conversations(config(chats, corpus, tmp_path, **change))


def test_all_ranks_raise_an_error_that_one_has_found(
    chats: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(chats.read_text("utf-8") + "{}\n", "utf-8")
    cache = tmp_path / "cache"
    asked = config(bad, corpus, cache)
    with pytest.raises(ValueError, match=r"bad\.jsonl:31: has none of the keys"):
        open_conversations(asked)
    with monkeypatch.context() as patch:
        patch.setattr(instructions, "write_indexed", lambda *_: pytest.fail("the file was read again"))
        with pytest.raises(ValueError, match=r"bad\.jsonl:31: has none of the keys"):
            open_conversations(asked)
    # a later run reads the file again
    monkeypatch.setattr(instructions, "SAME_RUN_S", 0.0)
    with pytest.raises(ValueError, match=r"bad\.jsonl:31: has none of the keys"):
        open_conversations(asked)
    assert sizes(open_conversations(config(bad, corpus, cache, bad_rows="skip", valid_fraction=0.0))) == {"train": 29}


def test_a_set_in_which_nothing_is_trained_is_refused(chats: Path, corpus: Corpus, tmp_path: Path) -> None:
    """For training and for each held-out set; a question longer than a row leaves no room for its answer."""
    long = tmp_path / "long.jsonl"
    messages = [{"role": "user", "content": "?" * 99}, {"role": "assistant", "content": "yes"}]
    long.write_text((json.dumps({"messages": messages}) + "\n") * 64, "utf-8")
    rest = rf"no row with a trained token is left: 64 conversations .* \(the first: {long}:1\); increase train.seq_len"
    for files, key in (
        ({"sft": str(long)}, "data.sft"),
        ({"sft": str(chats), "valid": {"hard": str(long)}}, "data.valid.hard"),
    ):
        with pytest.raises(ValueError, match=rf"^{key}={long}: {rest}"):
            open_conversations(config(chats, corpus, tmp_path, **files))
    assert sizes(open_conversations(config(long, corpus, tmp_path, overlong="truncate_left"))) == {
        "train": 63,
        "valid": 1,
    }


def test_held_out_files_say_what_was_noticed(
    chats: Path, corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "megalite")
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "p", "completion": "c"}\n\n{"prompt": 1}\n{"prompt": "</s>", "completion": "c"}\n')
    options: dict[str, Any] = {"valid": {"other": str(other)}, "bad_rows": "skip"}
    for name in ("other.jsonl", "renamed.jsonl"):  # the cache is of the content, the names are of today
        path = other.rename(tmp_path / name)
        caplog.clear()
        open_conversations(config(chats, corpus, tmp_path / "cache", **{**options, "valid": {"other": str(path)}}))
        assert f"{name}: 2 prompt/completion rows, template plain" in caplog.text
        assert f"warning: skipped 1 bad row (data.bad_rows=skip): {path}:3: 'prompt' is a number" in caplog.text
        assert f"inside messages were encoded as ordinary text: 1 row (the first: {path}:4)" in caplog.text
        other = path


def test_pretraining_data_is_refused_as_instruction_data(chats: Path, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file|is not instruction data"):
        open_conversations(config(chats, corpus, tmp_path, sft=str(corpus.train)))


def test_a_prefix_of_an_older_version_is_refused(chats: Path, corpus: Corpus, tmp_path: Path) -> None:
    open_conversations(config(chats, corpus, tmp_path))
    side = next(path for path in tmp_path.glob("sft-*.json") if "weights" not in path.name)
    values = json.loads(side.read_text("utf-8"))
    del values["report"]
    side.write_text(json.dumps(values), "utf-8")
    with pytest.raises(ValueError, match=r"older megalite or is damaged: .*\.json says nothing of report; make it"):
        open_conversations(config(chats, corpus, tmp_path, sft=str(side)[: -len(".json")]))


def test_a_model_with_a_smaller_vocabulary(chats: Path, corpus: Corpus, tmp_path: Path) -> None:
    small = dataclasses.replace(config(chats, corpus, tmp_path), model=ModelConfig(vocab_size=20))
    with pytest.raises(ValueError, match=r"tokens, model.vocab_size=20; name the tokenizer"):
        open_conversations(small)
