"""Damaged sidecars are refused by name."""

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from campaign import rounds

from megalite.config import Config, DataConfig, ModelConfig, TrainConfig
from megalite.data.instructions import Options, write_indexed
from megalite.data.origin import with_its_tokenizer
from megalite.data.preprocess import preprocess
from megalite.run.objective import objective_of
from megalite.text.chat import ChatTemplate, find_template
from megalite.text.tokenizer import Tokenizer


def mutated(value: Any, draw: random.Random) -> Any:
    """A JSON value with something in it gone or another."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(sorted(value))
        rest = {each: item for each, item in value.items() if each != key}
        return rest if draw.random() < 0.3 else {**rest, key: mutated(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.6:
        at = draw.randrange(len(value))
        return [*value[:at], mutated(value[at], draw), *value[at + 1 :]]
    return draw.choice([None, True, -1, 10**30, 1.5, "x", "", [], {}, [[]], {"a": 1}, float("nan"), "\ud800", "../x"])


@pytest.mark.parametrize("kind", ["sft", "path"])
def test_damaged_sidecars_are_refused_by_name(
    tmp_path: Path, kind: str, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("who? </s>", 9), ("x " * 99, 1)]
    lines = [json.dumps({"prompt": text, "completion": "I"}) + "\n" for text, count in rows for _ in range(count)]
    (tmp_path / "c.jsonl").write_text("".join(lines) + "{}\n")
    if kind == "sft":
        template = ChatTemplate(*find_template("plain", tokenizer), tokenizer)
        write_indexed(tmp_path / "c.jsonl", tmp_path / "c", tokenizer, template, Options(bad_rows="skip"))
        prefix = tmp_path / "c"
    else:
        done = preprocess([tmp_path / "c.jsonl"], tmp_path / "c", tokenizer, keys=["prompt"], skip_bad_rows=True)
        prefix = done.written[0].prefix
    sidecar, counts = Path(f"{prefix}.json"), Counter[str]()
    whole = json.loads(sidecar.read_text("utf-8"))
    for seed in range(rounds(60, 500)):
        sidecar.write_text(json.dumps(mutated(whole, random.Random(seed))))
        config = Config(
            ModelConfig(), data=DataConfig(**{kind: str(prefix)}, valid_fraction=0.0), train=TrainConfig(seq_len=64)
        )
        try:
            data = with_its_tokenizer(config.data, Path(config.train.run_dir), lambda _: None)
            objective_of(config).open_data(dataclasses.replace(config, data=data), True).train.batch([0])
            counts["read"] += 1
        except ValueError as error:
            named = str(prefix) in str(error) or "sidecar" in str(error)
            counts["refused by name" if named else str(error)] += 1
    assert counts.keys() <= {"read", "refused by name"}
    with capsys.disabled():
        print(f"\ndamaged sidecars, data.{kind}: {dict(sorted(counts.items()))}")
