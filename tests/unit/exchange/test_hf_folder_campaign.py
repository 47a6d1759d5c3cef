"""Damaged folders of models and adapters: what is wrong is one line that names the file, whatever was changed in it."""

import copy
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from campaign import rounds
from folders import Make
from safetensors.torch import load_file, save_file

from megalite.config.shapes import shapes
from megalite.exchange.adapter import import_peft
from megalite.exchange.hf_folder import INDEX, SINGLE, open_folder
from megalite.exchange.hf_weights import read_whole

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "\n",
    "\0", "\ud800", "../x", "a" * 5000, [], [[]], [0], [1.5, "x"], {}, {"a": {"b": None}},
    {"type": "linear", "factor": 2},
]  # fmt: skip


def changed(draw: random.Random, value: Any) -> Any:
    """A JSON value with one place in it made another."""
    value = copy.deepcopy(value)
    if not isinstance(value, dict | list) or not value or draw.random() < 0.2:
        return draw.choice(VALUES)
    keys = sorted(value) if isinstance(value, dict) else range(len(value))
    key: Any = draw.choice(list(keys))
    if draw.random() < 0.2:
        del value[key]
    elif isinstance(value, dict) and draw.random() < 0.15:
        value[draw.choice(["x", "\n", "quantization_config", "rope_scaling", "é" * 300])] = draw.choice(VALUES)
    else:
        value[key] = changed(draw, value[key])
    return value


def garbled(draw: random.Random, text: bytes) -> bytes:
    """Bytes with a few of them changed, added, taken away, or cut short."""
    found = bytearray(text)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(found))
        kind = draw.randrange(5)
        if kind == 0:
            found[place] = draw.randrange(256)
        elif kind == 1:
            found[place:place] = draw.choice([b"[" * 50_000, b'{"a":' * 50_000, b"\xff\xfe", b"9" * 5000, b'"', b"}"])
        elif kind == 2:
            del found[place : place + draw.randint(1, 9)]
        elif kind == 3:
            del found[place:]
            found += b" "
        else:
            found[place:place] = bytes([found[place]])
    return bytes(found)


def damage(draw: random.Random, file: Path) -> None:
    data = file.read_bytes()
    if file.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        header, rest = data[8 : 8 + length], data[8 + length :]
        if draw.random() < 0.6:
            header = json.dumps(changed(draw, json.loads(header))).encode()
        else:
            header = garbled(draw, header)
        told = len(header) if draw.random() < 0.9 else draw.choice([0, 1, 2**62, len(header) + 8])
        file.write_bytes(told.to_bytes(8, "little") + header + rest)
    elif draw.random() < 0.6:
        file.write_text(json.dumps(changed(draw, json.loads(data))))
    else:
        file.write_bytes(garbled(draw, data))


def base_folder(make: Make, folder: Path) -> None:
    """A small Llama in two files and an index."""
    shutil.copytree(make("Llama"), folder)
    whole = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(whole)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, keys in parts.items():
        save_file({key: whole[key] for key in keys}, folder / file, {"format": "pt"})
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def adapter_folder(folder: Path) -> None:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    prefix = "base_model.model.model.layers"
    factors = {f"{prefix}.{i}.self_attn.q_proj.lora_A.weight": torch.ones(2, 32) for i in range(4)}
    factors |= {f"{prefix}.{i}.self_attn.q_proj.lora_B.weight": torch.ones(32, 2) for i in range(4)}
    save_file(factors, folder / "adapter_model.safetensors")


def message_of(folder: Path, adapter: Path | None, run: Path) -> str | None:
    """What a refusal says; None where the folder is taken, and all of it can be read."""
    try:
        if adapter is not None:
            import_peft(adapter, folder, run)
            return None
        opened = open_folder(folder)
        for name in shapes(opened.model):
            read_whole(opened, name)
    except ValueError as error:
        return str(error)
    return None


def test_a_damaged_folder_is_one_line(folder_of: Make, tmp_path: Path) -> None:
    base_folder(folder_of, tmp_path / "base")
    adapter_folder(tmp_path / "adapter")
    files = {"base": ["config.json", INDEX, "a.safetensors", "b.safetensors"],
             "adapter": ["adapter_config.json", "adapter_model.safetensors"]}  # fmt: skip
    assert message_of(tmp_path / "base", None, tmp_path) is None
    assert message_of(tmp_path / "base", tmp_path / "adapter", tmp_path / "run") is None
    told: Counter[str] = Counter()
    taken: Counter[str] = Counter()
    number = rounds(150, 1500)
    for seed in range(number):
        draw = random.Random(seed)
        kind = draw.choice(["base", "base", "adapter"])
        folder, run = tmp_path / f"{seed}", tmp_path / f"run-{seed}"
        shutil.copytree(tmp_path / kind, folder)
        file = draw.choice(files[kind])
        damage(draw, folder / file)
        message = message_of(*((tmp_path / "base", folder) if kind == "adapter" else (folder, None)), run)
        if message is None:
            taken[file] += 1
        else:
            told[file] += 1
            assert "\n" not in message, (seed, message)
            assert str(folder) in message, (seed, message)
            assert len(message) < 700, (seed, message)
        shutil.rmtree(folder)
        shutil.rmtree(run, ignore_errors=True)
    print(f"{number} damaged folders: {sum(told.values())} told by name {dict(told)}, {sum(taken.values())} taken")
    assert sum(told.values()) > number // 2
