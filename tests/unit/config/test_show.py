"""A configuration as text: YAML that reads back, and the help of every key."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from command_lines import from_yaml, parse

from megalite.config import (
    Config,
    DataConfig,
    key_help,
    to_yaml,
)
from megalite.config.parse import SECTIONS


def odd() -> Config:
    return Config(
        data=DataConfig(path="a b: #c", valid={"en": "x y", "zh-1": "数据/中文"}, tokenizer="no", cache_dir="'q'\"r\""),
    )


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        odd(),
        parse("--preset", "tiny").config,
        parse("parallel.stages=[3,1]", "optim.lr=1e-7", "parallel.sp=false", "train.run_dir=12:30:45").config,
        parse("train.run_dir=nulls", "data.cache_dir=-", "data.tokenizer='a\\b'").config,
    ],
)
def test_to_yaml_reads_back(config: Config, tmp_path: Path) -> None:
    assert from_yaml(to_yaml(config), tmp_path) == config


def test_to_yaml_is_yaml_to_other_readers() -> None:
    assert yaml.safe_load(to_yaml(odd()))["data"]["valid"] == {"en": "x y", "zh-1": "数据/中文"}


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for section, cls in SECTIONS.items():
        for f in dataclasses.fields(cls):
            assert f"{section}.{f.name}  (" in printed
            assert f.metadata["help"]
    assert "train.steps  (int 1 to 1e9, default 100)" in key_help()
    assert "model.dropout  (float 0 to < 1, default 0.0)" in key_help()
    assert "optim.clip_grad  (float 0, 1e-6 to 1e6, default 1.0)" in key_help()
    assert "parallel.schedule  (1f1b|gpipe|interleaved|zb-h1, default 1f1b)" in key_help()
    assert "parallel.tp  (int or null 1 to 10000, default null)" in key_help()
    with pytest.raises(SystemExit):
        parse("--version")
    assert capsys.readouterr().out.startswith("megalite ")
