"""A small checkpoint's true values, and random changes of its files and headers."""

import dataclasses
import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.state import State
from megalite.config import Config, ModelConfig, resolve
from megalite.parallel.cuts import Shard, even, uncut

SEED = 2026


MODEL = ModelConfig(vocab_size=24, hidden_size=8, num_layers=2, num_heads=1, ffn_hidden_size=4, tie_embeddings=True)


CONFIG = resolve(Config(model=MODEL), 1)


SHAPES = CONFIG.shapes.model


KINDS = ("weight", "exp_avg", "exp_avg_sq")


STATE = dataclasses.asdict(State(step=3, consumed_samples=24, data="corpus: 9 tokens", base="0123456789abcdef /runs/a"))


STEP = "step-00000003"


NASTY: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 7, 8, 10**18, 2**63, 10**40, 3.0, 1e300, float("nan"), float("inf"), True, None),
    *(
        "",
        "x",
        "../outside",
        "/etc/passwd",
        ".hidden",
        "a/b",
        "x" * 5000,
        "\ud800",
        "a\nb",
        "\u202e",
        "\x00",
        "bfloat16",
    ),
    *([], {}, [[]], [0, 0], [10**18, 10**18], [-1, 8], {"blocks": []}, "__metadata__"),
)


Random = random.Random


def shards(rank: int, size: int) -> dict[str, Shard]:
    return {n: even(s, 0, size, rank) if len(s) == 2 else uncut(s, rank) for n, s in SHAPES.items()}


def values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return {
        f"{kind}.{name}": torch.randn(shape, generator=generator) for kind in KINDS for name, shape in SHAPES.items()
    }


TRUE = values()


# one mutation: changes the folder, and says what it did
Mutation = Callable[[Random, Path], str]


def data_file(rng: Random, folder: Path) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def any_file(rng: Random, folder: Path) -> Path:
    return rng.choice(sorted(folder.iterdir()))


def rewrite(path: Path, content: bytes) -> None:
    """A new file in the place of the old: one that is written over would be synced to the disk by some file systems."""
    path.unlink()
    path.write_bytes(content)


def change_bytes(change: Callable[[Random, bytearray], None]) -> Mutation:
    def mutate(rng: Random, folder: Path) -> str:
        path = any_file(rng, folder)
        raw = bytearray(path.read_bytes())
        change(rng, raw)
        rewrite(path, raw)
        return path.name

    mutate.__name__ = change.__name__
    return mutate


@change_bytes
def flip_a_bit(rng: Random, raw: bytearray) -> None:
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)


@change_bytes
def zero_a_run(rng: Random, raw: bytearray) -> None:
    at = rng.randrange(len(raw))
    end = min(len(raw), at + rng.randrange(1, 200))
    raw[at:end] = bytes(end - at)


@change_bytes
def cut(rng: Random, raw: bytearray) -> None:
    del raw[rng.randrange(len(raw)) :]


@change_bytes
def grow(rng: Random, raw: bytearray) -> None:
    raw += rng.randbytes(rng.randrange(1, 100))


@change_bytes
def empty(_: Random, raw: bytearray) -> None:
    raw.clear()


@change_bytes
def swap_two_runs(rng: Random, raw: bytearray) -> None:
    n = 64
    a, b = (rng.randrange(len(raw) // n) * n for _ in range(2))
    raw[a : a + n], raw[b : b + n] = raw[b : b + n], raw[a : a + n]


@change_bytes
def deep_nesting(rng: Random, raw: bytearray) -> None:
    text = rng.choice([b"[", b'{"a":']) * rng.choice([1000, 100_000])
    raw[:] = rng.choice([text, struct.pack("<Q", len(text)) + text])


def swap_files(rng: Random, folder: Path) -> str:
    a, b = rng.sample(sorted(folder.iterdir()), 2)
    a.rename(folder / "c")
    b.rename(a)
    (folder / "c").rename(b)
    return f"{a.name} {b.name}"


def remove_file(rng: Random, folder: Path) -> str:
    path = any_file(rng, folder)
    path.unlink()
    return path.name


def add_file(rng: Random, folder: Path) -> str:
    name = rng.choice(["rank-00002-000.safetensors", "rank-00000.json", ".hidden", "pytorch_model.bin", "x" * 255])
    (folder / name).write_bytes(rng.randbytes(99))
    return name


def link_file(rng: Random, folder: Path) -> str:
    path = any_file(rng, folder)
    outside = folder.parents[2] / "outside"
    shutil.copyfile(path, outside)
    path.unlink()
    path.symlink_to(rng.choice([outside, Path("/etc/passwd"), Path("/dev/zero"), Path("nowhere"), path]))
    return path.name


def link_folder(rng: Random, folder: Path) -> str:
    outside = folder.parents[2] / "moved"
    folder.rename(outside)
    folder.symlink_to(rng.choice([outside, outside, outside.with_name("nowhere"), folder]))
    return os.readlink(folder)


def no_plain_file(rng: Random, folder: Path) -> str:
    path = any_file(rng, folder)
    path.unlink()
    rng.choice([os.mkfifo, os.mkdir])(path)
    return path.name


def rename_folder(rng: Random, folder: Path) -> str:
    name = f"step-{rng.randrange(4, 99):08d}"
    folder.rename(folder.with_name(name))
    return name


class Payload:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


def a_pickle(rng: Random, folder: Path) -> str:
    path = rng.choice([any_file(rng, folder), folder / "rank-00000.json", folder / "model.pt", folder / "state.pkl"])
    size = path.stat().st_size if path.exists() else 0
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        if rng.random() < 0.5:
            pickle.dump(Payload(folder.parents[2] / "marker"), file)
        else:
            torch.save(Payload(folder.parents[2] / "marker"), file)
        if rng.random() < 0.5:  # also of the right size
            file.write(bytes(max(0, size - file.tell())))
    return path.name


def change_header(change: Callable[[Random, dict[str, Any]], str]) -> Mutation:
    """A change of a data file's header, in the room that the header had where it fits."""

    def mutate(rng: Random, folder: Path) -> str:
        path = data_file(rng, folder)
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        said = change(rng, header)
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        rewrite(path, struct.pack("<Q", len(text)) + text + raw[8 + length :])
        return f"{path.name}: {said}"

    mutate.__name__ = change.__name__
    return mutate


def keys_of(header: dict[str, Any]) -> list[str]:
    return [key for key in header if key != "__metadata__"]


@change_header
def header_entry(rng: Random, header: dict[str, Any]) -> str:
    key, field = rng.choice(keys_of(header)), rng.choice(["dtype", "shape", "data_offsets"])
    header[key][field] = rng.choice(
        [*NASTY, "F16", "BF16", "I64", [0, 10**18], [0, 0], [8, 0], [1, 2, 3], [0.0, 128.0]]
    )
    return f"{key} {field} = {header[key][field]!r:.40}"


@change_header
def header_keys(rng: Random, header: dict[str, Any]) -> str:
    a, b = rng.sample(keys_of(header), 2)
    way = rng.choice(["swap", "same", "drop", "nasty"])
    if way == "swap":
        header[a], header[b] = header[b], header[a]
    elif way == "same":
        header[a] = header[b]
    elif way == "drop":
        del header[a]
    else:
        header[a] = rng.choice(NASTY)
    return f"{way} {a} {b}"


@change_header
def header_metadata(rng: Random, header: dict[str, Any]) -> str:
    header["__metadata__"] = rng.choice(NASTY)
    return "metadata"


def header_length(rng: Random, folder: Path) -> str:
    path = data_file(rng, folder)
    raw = bytearray(path.read_bytes())
    length = rng.choice([0, 1, 2**31, 10**8, 10**18, 2**63, 2**64 - 1, len(raw), len(raw) - 8, rng.randrange(len(raw))])
    raw[:8] = struct.pack("<Q", length)
    rewrite(path, raw)
    return f"{path.name} {length}"


def duplicate_keys(rng: Random, folder: Path) -> str:
    """The same key twice in one object; readers of JSON take the last."""
    path = folder / "manifest.json"
    text = path.read_text()
    extra = f'"{rng.choice(["step", "tensors", "files", "config"])}": {rng.choice(["4", "{}", "[]", "null"])}'
    first = rng.random() < 0.5
    rewrite(path, ("{" + extra + "," + text[1:] if first else text.rstrip()[:-1] + "," + extra + "}").encode())
    return f"{extra} {'first' if first else 'last'}"
