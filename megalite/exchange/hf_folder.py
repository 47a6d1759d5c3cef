"""Open and check a Hugging Face model folder without torch: its model, the place of each tensor, its other files.

All mistakes in a folder are found here, before any weight is read. Weights are safetensors; pickles are never opened.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megalite.checkpoint.safetensors_file import UnknownDtype, read_header
from megalite.config import ResolvedModel
from megalite.config.dtypes import BY_CODE
from megalite.config.parameters import Shape
from megalite.config.values import shown
from megalite.exchange.hf_config import read_model
from megalite.exchange.hf_fields import Fields, as_json, read_json
from megalite.model.names import FAMILIES, hf_shapes

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# files of a folder, besides weights, that a copy of the model needs
CARRIED = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*"),
)
# buffers that old files contain and no model reads
BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq|(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: its `key` and `dtype` there (F32, BF16, ...); its bytes begin at `start`."""

    file: Path
    key: str
    dtype: str
    shape: Shape
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * BY_CODE[self.dtype].bytes


@dataclass(frozen=True)
class HFFolder:
    """A checked folder. `tensors`: by the names of `hf_shapes(model)`, all and no others. `context`: in tokens."""

    path: Path
    model: ResolvedModel
    context: int
    tensors: Mapping[str, Stored]


def open_config(path: str | Path) -> tuple[ResolvedModel, int]:
    """The model that a folder's config.json describes, and its context in tokens.

    Raises ValueError if the file is missing or the model is not supported.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name one that holds config.json and model.safetensors")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").exists():
        raise ValueError(
            f"{folder}: a peft adapter, not a model; import it with convert --from peft {folder} --base MODEL "
            f"(tools/checkpoint.py)"
        )
    config = read_json(_inside(folder, "config.json"))
    model = read_model(config, str(folder / "config.json"))
    context = Fields(config, str(folder / "config.json")).whole("max_position_embeddings", 2048)
    return model, model.max_positions or context


def open_folder(path: str | Path) -> HFFolder:
    """Open and check a folder. Raises ValueError, naming the file and tensor, for anything missing or not supported."""
    folder = Path(path)
    if (folder / "checkpoints").is_dir() and not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} is a run folder of megalite, not a Hugging Face folder; use checkpoint.load={folder}, or "
            f"convert --from megalite"
        )
    model, context = open_config(path)
    found: dict[str, Stored] = {}
    for file in weight_files(folder):
        for key, stored in read_tensors(file).items():
            if key in found:
                raise ValueError(
                    f"{file}: tensor {shown(key)} is in {found[key].file.name} too; download the folder again"
                )
            found[key] = stored
    expected = hf_shapes(model)
    # files of the bare model, without a head, lack this prefix
    prefix = FAMILIES[model.family].root
    tensors = {key if key in expected else prefix + key: stored for key, stored in found.items()}
    tensors = {name: stored for name, stored in tensors.items() if not BUFFERS.fullmatch(name)}
    if model.tie_embeddings:
        _drop_tied_copy(folder, tensors, next(iter(expected)), prefix)
    _compare(folder, tensors, expected)
    return HFFolder(folder, model, context, tensors)


def _compare(folder: Path, tensors: Mapping[str, Stored], expected: Mapping[str, Shape]) -> None:
    missing = [name for name in expected if name not in tensors]
    if missing == ["lm_head.weight"]:
        raise ValueError(
            f"{folder}: lm_head.weight is missing, and tie_word_embeddings is not true in config.json; if this model's "
            f'head is its embedding, write "tie_word_embeddings": true there'
        )
    if missing:
        raise ValueError(f"{folder}: {_few(missing)} missing; download the folder again")
    extra = [stored.key for name, stored in tensors.items() if name not in expected]
    if extra:
        raise ValueError(f"{folder}: {_few(extra)} not part of config.json's model; is that the right config.json?")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{tensors[name].file}: tensor {name} is {list(tensors[name].shape)}, config.json's model has "
                f"{list(shape)}; is that the right config.json?"
            )


def _few(names: list[str]) -> str:
    """Up to three names and a verb: "tensors a, b and 7 more are"."""
    names = [shown(name) for name in names]
    more = f" and {len(names) - 3} more are" if len(names) > 3 else " is" if len(names) == 1 else " are"
    return f"tensor{'s' * (len(names) > 1)} {', '.join(names[:3])}{more}"


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files. Raises ValueError if there are none, or the index does not match them.

    As in transformers, model.safetensors is preferred to an index: save_pretrained into a folder of shards leaves the
    old index there.
    """
    index, single = folder / INDEX, folder / SINGLE
    if single.is_file():
        return [single]
    if single.is_symlink():
        _inside(folder, SINGLE)
    if index.is_file():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise ValueError(f"{index}: has no weight_map of tensors to files; download the file again")
        files = [_inside(folder, name) for name in sorted(set(named.values()))]
        headers = {file.name: read_tensors(file) for file in files}
        lost = [key for key, name in named.items() if key not in headers[name]]
        if lost:
            raise ValueError(f"{index}: {_few(lost)} not in the file it names; download the folder again")
        return files
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise ValueError(
            f"{folder / pickles[0]}: a pickle, which can run code when opened; if you trust it, write safetensors: "
            f"AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('NEW_FOLDER')"
        )
    raise ValueError(f"{folder}: holds neither {SINGLE} nor {INDEX}; download the weights")


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of a folder. Raises ValueError if it is missing or `name` is a path.

    Names come from an index, which must not lead out of the folder. Links may: caches and shared model folders consist
    of links that the user has made.
    """
    if name != Path(name).name or name in ("", ".", "..") or len(name.encode(errors="replace")) > 255:
        raise ValueError(f"{folder}: {as_json(name)} is not the plain name of a file in the folder; download it again")
    file = folder / name
    if not file.is_file():
        gone = f"a link to {file.readlink()}, which is not a file" if file.is_symlink() else "no such file"
        raise ValueError(f"{file}: {gone}; download it again")
    return file


def read_tensors(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by key, without BUFFERS. Raises ValueError if it is damaged or quantised."""
    try:
        with open(file, "rb") as stream:
            entries = read_header(stream, BUFFERS.fullmatch)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); check its permissions") from None
    except UnknownDtype as error:
        raise ValueError(f"{file}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}; download it again") from None
    return {key: Stored(file, key, entry.dtype, entry.shape, entry.start) for key, entry in entries.items()}


def _drop_tied_copy(folder: Path, tensors: dict[str, Stored], embedding: str, prefix: str) -> None:
    """Remove a stored head that equals the embedding it is tied to. Raises ValueError if it differs."""
    copy = tensors.pop("lm_head.weight", None) or tensors.pop(f"{prefix}lm_head.weight", None)
    if copy is None or embedding not in tensors:
        return
    original = tensors[embedding]
    with open(copy.file, "rb") as a, open(original.file, "rb") as b:
        a.seek(copy.start)
        b.seek(original.start)
        step, same = 1 << 22, copy.size == original.size
        for done in range(0, copy.size if same else 0, step):
            count = min(step, copy.size - done)
            same = same and a.read(count) == b.read(count)
    if not same:
        raise ValueError(
            f"{folder}: lm_head.weight differs from {embedding}, but tie_word_embeddings in config.json says they are "
            f"one matrix; set it to false there"
        )


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer file of a folder: tokenizer.json, else tokenizer.model; None if it has neither."""
    names = ("tokenizer.json", "tokenizer.model")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def carry(source: Path, target: Path) -> list[str]:
    """Copy the files of a model folder, except weights. Returns their names, sorted."""
    files = sorted({file for pattern in CARRIED for file in source.glob(pattern) if file.is_file()})
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    return [str(file.relative_to(source)) for file in files]


def require_new(target: Path, key: str) -> None:
    """Raise ValueError unless the folder `target` is new or empty and its parent is writable. `key` names it."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{key}={target} is a file; name a new folder")
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{key}={target} is not empty; nothing is overwritten, name a new folder")
    parent = next(p for p in target.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{key}={target} cannot be written: {parent} is not a writable folder; name another")
