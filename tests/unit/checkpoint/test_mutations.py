"""A thousand damaged or forged checkpoints: each is refused in a line that names file or tensor, or loads right.

A manifest whose digest the forger has corrected can claim another step, configuration, version or data fingerprint:
digests are no signatures, and nothing tells these from true ones (all that is not in TENSORS) as long as they are of
values that a run can have. Its tensors are checked all the same: which there must be by the configuration, shapes,
ranges, dtypes, names and checksums against the files. No mutation may run code, take memory that the files do not
account for, wait, or end in any other exception. What `verify` calls good can be loaded and resumed from.
"""

import copy
import dataclasses
import json
import os
import pickle
import random
import resource
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.checkpoint import blocks as blocks_module
from megalite.checkpoint.describe import describe, describe_lines, state_of
from megalite.checkpoint.faults import Faults
from megalite.checkpoint.folder import BUILDING, check_model, find, read_manifest
from megalite.checkpoint.load import load, read_tensor
from megalite.checkpoint.manifest import Damaged, digest
from megalite.checkpoint.publish import publish, write_rank
from megalite.checkpoint.save import own_parts
from megalite.checkpoint.state import State
from megalite.checkpoint.verify import verify
from megalite.config import Config, ModelConfig, resolve
from megalite.parallel.cuts import Shard, even, uncut

SEED, COUNT = 2026, 1200
MODEL = ModelConfig(vocab_size=24, hidden_size=8, num_layers=2, num_heads=1, ffn_hidden_size=4, tie_embeddings=True)
CONFIG = resolve(Config(model=MODEL), 1)
SHAPES = CONFIG.shapes.model
KINDS = ("weight", "exp_avg", "exp_avg_sq")
STATE = dataclasses.asdict(State(step=3, consumed_samples=24, data="corpus: 9 tokens", base="0123456789abcdef /runs/a"))
STEP = "step-00000003"
# what the manifest says of tensors, and of itself
TENSORS = {"format", "digest", "files", "tensors"}
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


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of two ranks, in blocks of a few rows and two files a rank."""
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", 128)
    monkeypatch.setattr(blocks_module, "FILE_BYTES", 1500)
    final = tmp_path / "good" / "checkpoints" / STEP
    for rank in range(2):
        here = shards(rank, 2)
        kinds = {kind: {n: here[n].cut(TRUE[f"{kind}.{n}"]) for n in SHAPES} for kind in KINDS}
        spans = {n: range(here[n].numel) for n in SHAPES}
        owned = list(own_parts(here, spans, kinds))
        building = final.with_name(BUILDING + final.name)
        write_rank(building, rank, [p for p, _ in owned], (v for _, v in owned), Faults(rank, ""))
    publish(building, final, CONFIG, STATE, Faults(0, ""))
    assert len(list(final.glob("rank-00001-*.safetensors"))) > 1
    return final


@pytest.fixture
def little_memory() -> Iterator[None]:
    """The process may take half a GiB more than it has; what asks for more fails with no ValueError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


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


def change_manifest(change: Callable[[Random, dict[str, Any]], str], sign: bool) -> Mutation:
    """A change of the manifest; `sign`: by a forger, who corrects its digest."""

    def mutate(rng: Random, folder: Path) -> str:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        said = change(rng, manifest)
        if sign:
            manifest["digest"] = digest(manifest)
        rewrite(path, json.dumps(manifest).encode())
        return said

    mutate.__name__ = change.__name__ + ("_signed" if sign else "")
    return mutate


def any_value(rng: Random, manifest: dict[str, Any], top: str = "") -> str:
    """Another value, key, order or number of items at a random place."""
    place: Any = manifest
    key: Any = top or rng.choice(sorted(manifest))
    path = [key]
    while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.85:
        place = place[key]
        key = rng.choice(sorted(place)) if isinstance(place, dict) else rng.randrange(len(place))
        path.append(key)
    where = ".".join(map(str, path))
    way = rng.choice(["nasty", "nasty", "delete", "near", "rename", "double"])
    if way == "delete":
        del place[key]
    elif way == "near" and type(place[key]) is int:
        place[key] += rng.choice([-8, -1, 1, 8, 10**18])
    elif way == "rename" and isinstance(place, dict):
        place[rng.choice(["../up", "/abs", "x" * 5000, "a\nb", "\ud800", "weight.other"])] = place.pop(key)
    elif way == "double" and isinstance(place, list):
        place.insert(key, copy.deepcopy(place[key]))
    else:
        place[key] = copy.deepcopy(rng.choice(NASTY))
    return f"{way} {where}"


def any_tensor_value(rng: Random, manifest: dict[str, Any]) -> str:
    return any_value(rng, manifest, rng.choice(["tensors", "files"]))


def swap_in_blocks(rng: Random, manifest: dict[str, Any]) -> str:
    """Two blocks, or a field of each, change places."""
    blocks = [(name, b) for name, tensor in manifest["tensors"].items() for b in tensor["blocks"]]
    (m, a), (n, b) = rng.sample(blocks, 2)
    fields = rng.choice([["file"], ["key"], ["start"], ["size"], ["sha256"], ["file", "key", "sha256"], list(a)])
    for field in fields:
        a[field], b[field] = b[field], a[field]
    return f"{m} {n} {fields}"


def swap_tensors(rng: Random, manifest: dict[str, Any]) -> str:
    a, b = rng.sample(sorted(manifest["tensors"]), 2)
    manifest["tensors"][a], manifest["tensors"][b] = manifest["tensors"][b], manifest["tensors"][a]
    return f"{a} {b}"


def huge_tensor(rng: Random, manifest: dict[str, Any]) -> str:
    """A tensor of up to 10^18 elements that agrees with itself, in a file that is said to be as large."""
    name = rng.choice(sorted(manifest["tensors"]))
    rows = rng.choice([10**7, 10**10, 10**17])
    tensor = manifest["tensors"][name]
    block = tensor["blocks"][0]
    tensor["shape"], tensor["blocks"] = [rows, 8], [block]
    block.update(start=[0, 0], size=[rows, 8], key=f"{name}[0:{rows},0:8]")
    if rng.random() < 0.5:
        manifest["files"][block["file"]] = 10**20
    return f"{name} {rows}"


def nest_config(rng: Random, manifest: dict[str, Any]) -> str:
    deep: Any = 1
    for _ in range(rng.choice([50, 400])):
        deep = [deep]
    manifest["config"]["model"]["deep"] = deep
    return "config"


def drop_tensors(rng: Random, manifest: dict[str, Any]) -> str:
    """One tensor, one parameter, one layer, one kind or all that a rank has written is not listed."""
    tensors = manifest["tensors"]
    name = rng.choice(sorted(tensors))
    _, _, parameter = name.partition(".")
    way = rng.choice(["tensor", "parameter", "layer", "kind", "rank"])
    gone = {
        "tensor": lambda n: n == name,
        "parameter": lambda n: n.endswith(f".{parameter}"),
        "layer": lambda n: ".layers.1." in n,
        "kind": lambda n: n.startswith(f"{rng.choice(KINDS[:1])}."),
        "rank": lambda n: any(block["file"].startswith("rank-00001") for block in tensors[n]["blocks"]),
    }[way]
    for each in [n for n in tensors if gone(n)]:
        del tensors[each]
    return f"{way} {name}"


def half_of_a_tensor(rng: Random, manifest: dict[str, Any]) -> str:
    """What one rank holds of a tensor is all there is said to be, in a shape that agrees."""
    name = rng.choice(sorted(n for n, t in manifest["tensors"].items() if len(t["blocks"]) > 1))
    tensor = manifest["tensors"][name]
    tensor["blocks"] = tensor["blocks"][:1]
    tensor["shape"] = list(tensor["blocks"][0]["size"])
    return name


COUNTERS: dict[str, tuple[Any, ...]] = {
    "step": (-1, 10**30, True, 3.0, None),
    "consumed_samples": (-1, 0, 2, 10**16, 10**30, 10**300, 24.0, "24"),
    "skipped_steps": (-1, 9, 10**30, None),
    "scale_steps": (-1, 9, 10**30, 0.5),
    "loss_scale": (1e308, 1e39, 10**400, float("inf"), float("nan"), 0, 0.0, -2.0, None, "1", True),
    "best_loss": (float("nan"), float("inf"), -float("inf"), 10**400, "x", [], True),
    "evals_without_gain": (-1, 9, 10**30, None),
    "data": (None, 7, ["corpus"]),
    "base": (None, 7, "here", "0123 /runs/a", "/runs/a"),
    "versions": (None, 7, ["torch"], {"torch": 2}),
}


def nonsense_counter(rng: Random, manifest: dict[str, Any]) -> str:
    key = rng.choice(sorted(COUNTERS))
    manifest[key] = rng.choice(COUNTERS[key])
    return f"{key} = {manifest[key]!r:.40}"


def other_configuration(rng: Random, manifest: dict[str, Any]) -> str:
    """A configuration that needs other tensors than there are, or that cannot be read."""
    section, key, value = rng.choice(
        [
            ("model", "num_layers", rng.choice([0, 1, 3, 10**9, 10**30, -2])),
            ("model", "hidden_size", rng.choice([0, 4, 16, -8, 10**18])),
            ("model", "num_heads", 0),
            ("model", "tie_embeddings", False),
            ("model", "qkv_bias", True),
            ("model", "norm", rng.choice(["layernorm", "batchnorm", 5, None])),
            ("model", "activation", "gelu"),
            ("train", "dtype", rng.choice(["bf16", "fp64", "int8"])),
            ("optim", "name", rng.choice(["sgd", None, 3])),
            ("optim", "lr", rng.choice(["fast", float("nan"), []])),
            ("tune", "mode", "lora"),
            ("tune", "freeze", rng.choice(["embed.*", "nothing.*", "*"])),
            ("parallel", "unheard_of", 1),
            ("unheard_of", "key", 1),
        ]
    )
    manifest["config"].setdefault(section, {})[key] = value
    return f"{section}.{key} = {value!r:.40}"


def no_section(rng: Random, manifest: dict[str, Any]) -> str:
    section = rng.choice(sorted(manifest["config"]))
    manifest["config"][section] = rng.choice([None, 1, "x", [], [1]])
    return section


CHANGES = (any_value, any_tensor_value, any_tensor_value, swap_in_blocks, swap_tensors, huge_tensor, nest_config)
NEVER_BELIEVED = (drop_tensors, half_of_a_tensor, nonsense_counter, other_configuration, no_section)
MUTATIONS: tuple[Mutation, ...] = (
    *(flip_a_bit, zero_a_run, cut, grow, empty, swap_two_runs, deep_nesting, swap_files, remove_file, add_file),
    *(link_file, link_folder, no_plain_file, rename_folder, a_pickle, duplicate_keys),
    *(header_entry, header_keys, header_metadata, header_length),
    *(change_manifest(change, sign) for change in (*CHANGES, *NEVER_BELIEVED) for sign in (False, True)),
)


def read_all(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(state, tensors) as they are loaded whole and, bit for bit the same, as the second of two ranks loads them."""
    manifest = read_manifest(find(folder))
    check_model(manifest, CONFIG.model.__dict__, folder)
    tensors = {name: read_tensor(folder, manifest, name) for name in TRUE}
    here = shards(1, 2)
    local = {kind: {n: torch.zeros(here[n].local_shape) for n in SHAPES} for kind in KINDS}
    load(folder, manifest, here, local)
    assert all(local[k][n].equal(here[n].cut(tensors[f"{k}.{n}"])) for k in KINDS for n in SHAPES)
    return state_of(manifest), tensors


def judge(folder: Path) -> tuple[str, dict[str, Any]]:
    """("refused", {}) or ("loaded", its state); fails on anything between."""
    try:
        state, tensors = read_all(folder)
    except ValueError as error:
        text = str(error)
        assert "\n" not in text
        assert text.isprintable()
        assert len(text) < 1000
        assert str(folder) in text or any(name in text for name in TRUE), text
        return "refused", {}
    for name, x in tensors.items():
        assert x.dtype == TRUE[name].dtype
        assert x.equal(TRUE[name]), name
    return "loaded", state


def also_by_the_tool(folder: Path) -> bool:
    """What `verify` and `info` of tools/checkpoint.py call: whether they find the checkpoint whole."""
    try:
        manifest = read_manifest(folder)
    except ValueError:
        return False
    describe_lines(describe(folder, manifest))
    return not verify(folder, manifest, threads=1).damages


def test_a_thousand_mutations(good: Path, tmp_path: Path, little_memory: None) -> None:
    assert judge(good) == ("loaded", STATE)
    assert also_by_the_tool(good)
    outcomes: Counter[tuple[str, str]] = Counter()
    for number in range(COUNT):
        rng = Random(f"{SEED} {number}")
        mutation = MUTATIONS[number % len(MUTATIONS)]
        run = tmp_path / f"mutated-{number}"
        shutil.copytree(good.parents[1], run)
        folder = run / "checkpoints" / STEP
        said = f"seed {SEED}, number {number}: {mutation.__name__} {mutation(rng, folder)}"
        if mutation is rename_folder:
            (folder,) = (run / "checkpoints").iterdir()
        try:
            outcome, state = judge(folder)
            forged = mutation.__name__.endswith("_signed")
            if outcome == "loaded" and not forged:
                assert state == STATE
            if outcome == "loaded" and forged:
                claimed = [key for key in {*STATE, *state} if state.get(key, key) != STATE.get(key, key)]
                assert len(claimed) <= 2  # a renamed key is one that went and one that came
                assert not TENSORS & set(claimed)
            whole = also_by_the_tool(folder)
            # a forged configuration may be of another model with the same tensors
            assert whole == (outcome == "loaded") or (whole and forged and "config" in said)
        except Exception as error:
            raise AssertionError(said) from error
        assert not (tmp_path / "marker").exists(), said
        outcomes[mutation.__name__, outcome] += 1
        shutil.rmtree(run)
        for name in ("outside", "moved"):
            path = tmp_path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    never_harmless = {"flip_a_bit", "cut", "grow", "empty", "remove_file", "swap_files", "link_file", "rename_folder"}
    never_harmless |= {f"{change.__name__}{signed}" for change in NEVER_BELIEVED for signed in ("", "_signed")}
    assert not [name for name, outcome in outcomes if name in never_harmless and outcome == "loaded"]
    assert {name for name, outcome in outcomes if outcome == "loaded"} >= {"add_file", "link_folder", "duplicate_keys"}
    print("\n".join(f"{name:<28}{outcome:<9}{count}" for (name, outcome), count in sorted(outcomes.items())))


OTHERS = {"step": 7, "consumed_samples": 7, "best_loss": 7, "data": "7", "base": "0123456789abcdef /runs/b"}


@pytest.mark.parametrize("key", sorted(STATE))
def test_a_forger_can_change_only_what_is_no_tensor(good: Path, key: str) -> None:
    """With the digest corrected another counter is believed (the step too, with its folder's name)."""
    path = good / "manifest.json"
    manifest = json.loads(path.read_text())
    assert key not in TENSORS
    manifest[key] = OTHERS.get(key, 2)
    manifest["digest"] = digest(manifest)
    path.write_text(json.dumps(manifest))
    folder = good.rename(good.with_name("step-00000007")) if key == "step" else good
    assert judge(folder) == ("loaded", {**STATE, key: manifest[key]})


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in COUNTERS.items() for value in values])
def test_no_counter_is_believed_that_a_run_cannot_have(good: Path, key: str, value: Any) -> None:
    path = good / "manifest.json"
    manifest = json.loads(path.read_text()) | {key: value}
    manifest["digest"] = digest(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match=rf"manifest\.json: not a manifest \(.*{key}") as error:
        read_manifest(good)
    assert len(str(error.value)) < 600


def test_a_checkpoint_of_weights_alone_is_whole(good: Path) -> None:
    """As one that was converted; of one kind of the optimizer's tensors alone it is not."""
    path = good / "manifest.json"
    manifest = json.loads(path.read_text())
    for kinds in (("weight", "exp_avg"), ("weight",)):
        tensors = {name: t for name, t in manifest["tensors"].items() if name.split(".")[0] in kinds}
        changed = manifest | {"tensors": tensors}
        path.write_text(json.dumps(changed | {"digest": digest(changed)}))
        if kinds == ("weight",):
            assert verify(good, read_manifest(good), threads=1).damages == []
        else:
            with pytest.raises(Damaged, match=r"14 of the 42 tensors that its configuration needs are missing, among"):
                read_manifest(good)
