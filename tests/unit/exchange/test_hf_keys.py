"""A sample longer than the model's context is told at the start, with what would stretch it."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megalite.config import CheckpointConfig, Config, ConfigError, TrainConfig, check, parse_command_line, resolve
from megalite.exchange.hf_config import read_model
from megalite.exchange.hf_keys import context_warning, with_hf

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 80}
LLAMA = {"model_type": "llama", "num_key_value_heads": 4, **SIZES}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 512}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
GPT2 = {"model_type": "gpt2", "vocab_size": 96, "n_embd": 64, "n_layer": 4, "n_head": 8, "n_positions": 128}


def config(folder: Path, values: dict[str, Any], seq_len: int) -> Config:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    words = [f"model.from_hf={folder}", f"train.seq_len={seq_len}", "parallel.tp=1", "parallel.pp=1"]
    return resolve(with_hf(parse_command_line(words, default_preset="tiny", prog="test")).config, 1)


@pytest.mark.parametrize(
    ("values", "context"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"max_position_embeddings": 2048, "model_type": "mistral", "sliding_window": 64}, 2048),
        ({"max_position_embeddings": 2048, "model_type": "qwen3"}, 2048),
        ({"max_position_embeddings": 4096, "rope_scaling": LLAMA3}, 4096),
        ({"max_position_embeddings": 4096, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, 4096),
        ({"max_position_embeddings": 1024, "rope_scaling": YARN}, 4096),  # Qwen2.5 gives the context before
        ({"max_position_embeddings": 4096, "rope_scaling": YARN}, 4096),
        ({"max_position_embeddings": 1024, "rope_scaling": {"type": "linear", "factor": 2.0}}, 2048),
    ],
)
def test_a_sample_longer_than_the_context_is_told(tmp_path: Path, values: dict[str, Any], context: int) -> None:
    assert context_warning(config(tmp_path / "fits", LLAMA | values, context)) == ""
    found = context_warning(config(tmp_path / "long", LLAMA | values, 2 * context))
    assert found.startswith(f"WARNING: train.seq_len={2 * context} is more than the {context} positions of {tmp_path}")
    assert f"Use train.seq_len={context}, or stretch RoPE: " in found
    assert "\n" not in found


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_the_remedy_works_and_keeps_the_frequencies(tmp_path: Path, key: str) -> None:
    theta = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}} if key == "rope_parameters" else {}
    values = LLAMA | {"rope_theta": 5e5, "max_position_embeddings": 100} | theta
    found = re.search(rf'set ("{key}": {{.*}}) in config.json', context_warning(config(tmp_path / "a", values, 250)))
    assert found is not None
    values |= json.loads("{" + found[1] + "}")
    mended = config(tmp_path / "b", values, 250)
    assert context_warning(mended) == ""
    m = mended.model
    assert (m.rope_scaling, m.rope_factor, m.rope_original_max_positions, m.rope_theta) == ("yarn", 3.0, 100, 5e5)


def test_what_the_folder_does_not_say_is_not_guessed(tmp_path: Path) -> None:
    assert context_warning(config(tmp_path / "model", LLAMA, 10**6)) == ""
    assert context_warning(resolve(Config(train=TrainConfig(seq_len=10**6)), 1)) == ""
    lost = CheckpointConfig(load=str(tmp_path / "lost"))
    assert context_warning(resolve(Config(checkpoint=lost), 1)) == ""


def test_a_run_that_came_from_a_folder_remembers_its_context(tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "step-00000000"
    step.mkdir(parents=True)
    (step / "manifest.json").touch()
    (tmp_path / "run" / "hf").mkdir()
    values = LLAMA | {"max_position_embeddings": 128}
    (tmp_path / "run" / "hf" / "config.json").write_text(json.dumps(values))
    train = TrainConfig(seq_len=256)
    load = CheckpointConfig(load=str(tmp_path / "run"))
    loaded = resolve(Config(model=read_model(values, "config.json"), train=train, checkpoint=load), 1)
    assert "is more than the 128 positions of" in context_warning(loaded)
    assert context_warning(dataclasses.replace(loaded, train=TrainConfig(seq_len=128))) == ""


def test_learned_positions_are_refused_without_a_remedy_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"more than model.max_positions=128 learned positions; use .*=128 or less$"):
        check(config(tmp_path / "gpt2", GPT2, 256), 1)
