"""Megatron-LM checkpoints with arguments and bytes changed at random: one line that names the file, and no code run."""

import argparse
import random
import shutil
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from campaign import rounds
from test_hf_folder_campaign import VALUES, garbled
from test_megatron_models import LLAMA_ARGS, SMALL, randomised, write

from megalite.exchange.megatron import FILE, from_megatron

transformers = pytest.importorskip("transformers")


def change_args(draw: random.Random, file: Path) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(file, weights_only=True)
    for key in draw.sample(sorted(LLAMA_ARGS), draw.randint(1, 2)):
        value = draw.choice([*VALUES, torch.ones(3), (1, 2), {1}, torch.float16])
        setattr(content["args"], draw.choice([key, key, "unknown_option"]), value)
    torch.save(content, file)


def change_bytes(draw: random.Random, file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in parts if name.endswith("data.pkl"))
    parts[pickled] = garbled(draw, parts[pickled])
    with zipfile.ZipFile(file, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)


def message_of(folder: Path, run: Path) -> str | None:
    try:
        from_megatron(folder, run, allow_pickle=True)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("ignore")
def test_a_changed_checkpoint_is_one_line(tmp_path: Path) -> None:
    model = randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)))
    whole = write(tmp_path / "whole", model, LLAMA_ARGS, 1, [[5]])
    assert message_of(whole, tmp_path / "run") is None
    told: Counter[str] = Counter()
    number = rounds(60, 600)
    for seed in range(number):
        draw = random.Random(seed)
        folder, run = tmp_path / f"{seed}", tmp_path / f"run-{seed}"
        shutil.copytree(whole, folder)
        change: Any = draw.choice([change_args, change_bytes])
        change(draw, folder / "mp_rank_00" / FILE)
        message = message_of(folder, run)
        if message is not None:
            told[change.__name__] += 1
            assert "\n" not in message, (seed, message)
            assert str(folder) in message, (seed, message)
        shutil.rmtree(folder)
        shutil.rmtree(run, ignore_errors=True)
    print(f"{number} changed checkpoints: {sum(told.values())} told by name {dict(told)}")
    assert sum(told.values()) > number // 2
