"""Which tokenizer a run takes for indexed data: the one that the data was made with, wherever it is now."""

from pathlib import Path
from typing import Any

import pytest
from assets import asset

from megalite.config.schema import DataConfig
from megalite.data.instructions import Options, write_indexed
from megalite.data.origin import with_its_tokenizer
from megalite.data.preprocess import preprocess
from megalite.text.chat import ChatTemplate, find_template
from megalite.text.tokenizer import load_tokenizer


def test_the_tokenizer_that_is_not_there_is_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("one text")
    Path("data").mkdir()
    said = list[str]()

    def found(prefix: str, **data: Any) -> str | None:
        said.clear()
        return with_its_tokenizer(DataConfig(path=prefix, **data), Path("run"), said.append).tokenizer

    own = asset("mistral-v1/tokenizer.model").read_bytes()
    Path("data/tok.model").write_bytes(own)
    preprocess(["t.txt"], "data/t", load_tokenizer("data/tok.model"))
    Path("data").rename("moved")
    assert found("moved/t_text_document") == "moved/tok.model"  # it lay beside the data and moved with it
    Path("moved/tok.model").rename("elsewhere.model")
    assert found("moved/t_text_document") is None
    assert said == [
        "note: the tokenizer that made moved/t_text_document is missing or has changed: tok.model; generate, "
        "evaluate and export need it: set data.tokenizer"
    ]
    Path("run").mkdir()
    Path("run/tokenizer.model").write_bytes(own)  # the run has kept it when it began
    assert found("moved/t_text_document") == "run/tokenizer.model"
    assert found("moved/t_text_document", tokenizer="elsewhere.model") == "elsewhere.model"
    assert said == []
    other = str(asset("smollm2") / "tokenizer.json")
    assert found("moved/t_text_document", tokenizer=other) == other
    assert said == [
        f"note: moved/t_text_document was made with another tokenizer than data.tokenizer={other}: tok.model"
    ]
    Path("moved/t_text_document.json").unlink()
    assert found("moved/t_text_document") is None
    assert said[0].startswith("note: moved/t_text_document does not name the tokenizer that made it")


def test_conversations_made_beforehand_know_their_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text('{"prompt": "who?", "completion": "I"}\n')
    tokenizer = load_tokenizer(asset("mistral-v1/tokenizer.model"))
    template = ChatTemplate(*find_template("plain", tokenizer), tokenizer)
    write_indexed("chats.jsonl", Path("data/chats"), tokenizer, template, Options())
    assert with_its_tokenizer(DataConfig(sft="data/chats"), Path("run"), print).tokenizer == str(tokenizer.path)
