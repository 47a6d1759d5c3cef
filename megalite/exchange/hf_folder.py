"""A Hugging Face model folder looked at without torch: its model, where each tensor lies, and what goes along with it.

Everything that can be wrong with a folder is found here, before a byte of a weight is read. Weights are safetensors: a
pickle is never opened.
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
# what a folder holds beside weights, and a copy of the model needs
CARRIED = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*"),
)
# buffers that old files store and no model reads
BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq|(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: `key` there, `dtype` as there (F32, BF16, ...), its bytes from `start`."""

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
    """`tensors`: by the names of `hf_shapes(model)`, all of them and no other. `context`: positions it was made for."""

    path: Path
    model: ResolvedModel
    context: int
    tensors: Mapping[str, Stored]


def open_config(path: str | Path) -> tuple[ResolvedModel, int]:
    """The model of a folder by its config.json, and its context; ValueError for what is not there or not built."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name one that holds config.json and model.safetensors")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").exists():
        raise ValueError(
            f"{folder}: an adapter of peft and no model; import it with convert --from peft {folder} --base MODEL "
            f"(tools/checkpoint.py)"
        )
    config = read_json(_inside(folder, "config.json"))
    model = read_model(config, str(folder / "config.json"))
    context = Fields(config, str(folder / "config.json")).whole("max_position_embeddings", 2048)
    return model, model.max_positions or context


def open_folder(path: str | Path) -> HFFolder:
    """Open and check a folder. ValueError names what is missing, too much, of another shape, damaged or not built."""
    folder = Path(path)
    if (folder / "checkpoints").is_dir() and not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} is a run folder of megalite, no Hugging Face folder; use checkpoint.load={folder}, or convert "
            f"--from megalite"
        )
    model, context = open_config(path)
    found: dict[str, Stored] = {}
    for file in weight_files(folder):
        for key, stored in read_tensors(file).items():
            if key in found:
                raise ValueError(
                    f"{file}: tensor {key} stands in {found[key].file.name} too; download the folder again"
                )
            found[key] = stored
    expected = hf_shapes(model)
    # a file of the bare model leaves out the name of the part that a head stands on
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
            f"{folder}: there is no lm_head.weight, and tie_word_embeddings is not true in config.json; if the head of "
            f'this model is its embedding, write "tie_word_embeddings": true there'
        )
    if missing:
        raise ValueError(f"{folder}: {_few(missing)} of config.json's model missing; download the folder again")
    extra = [stored.key for name, stored in tensors.items() if name not in expected]
    if extra:
        raise ValueError(f"{folder}: {_few(extra)} not of config.json's model; is that the right config.json?")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{tensors[name].file}: tensor {name} is {list(tensors[name].shape)}, config.json's model has "
                f"{list(shape)}; is that the right config.json?"
            )


def _few(names: list[str]) -> str:
    names = [shown(name) for name in names]
    more = f" and {len(names) - 3} more are" if len(names) > 3 else " is" if len(names) == 1 else " are"
    return f"tensor{'s' * (len(names) > 1)} {', '.join(names[:3])}{more}"


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files; names of an index are plain names of files beside it.

    As in transformers, a whole model.safetensors comes before an index: save_pretrained over a folder of shards leaves
    the old index beside it.
    """
    index, single = folder / INDEX, folder / SINGLE
    if single.is_file():
        return [single]
    if single.is_symlink():
        _inside(folder, SINGLE)
    if index.is_file():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise ValueError(f"{index}: has no weight_map of tensor to file; download the file again")
        files = [_inside(folder, name) for name in sorted(set(named.values()))]
        headers = {file.name: read_tensors(file) for file in files}
        lost = [key for key, name in named.items() if key not in headers[name]]
        if lost:
            raise ValueError(f"{index}: {_few(lost)} not in the file it names; download the folder again")
        return files
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise ValueError(
            f"{folder / pickles[0]}: a pickle, which can run code as it is opened; if you trust it, write safetensors: "
            f"AutoModelForCausalLM.from_pretrained('{folder}').save_pretrained('NEW_FOLDER')"
        )
    raise ValueError(f"{folder}: holds neither {SINGLE} nor {INDEX}; download the weights")


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of a folder, or what a link of that name leads to; ValueError where there is none.

    The name comes from an index, which must not lead elsewhere. A link was made by whoever arranged the folder: caches
    and shared model folders are made of links.
    """
    if name != Path(name).name or name in ("", ".", "..") or len(name.encode(errors="replace")) > 255:
        raise ValueError(f"{folder}: {as_json(name)} is not the plain name of a file in the folder; download it again")
    file = folder / name
    if not file.is_file():
        gone = f"a link to {file.readlink()}, which is no file" if file.is_symlink() else "no such file"
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
    """Take away a stored head that repeats the embedding it is tied to; ValueError where it is another matrix."""
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
            f"{folder}: lm_head.weight is another matrix than {embedding}, but tie_word_embeddings says they are one; "
            f"set it to false in config.json"
        )


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer file that megalite reads: tokenizer.json before tokenizer.model."""
    names = ("tokenizer.json", "tokenizer.model")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def carry(source: Path, target: Path) -> list[str]:
    """Copy everything of a model folder but its weights; gives the names, sorted."""
    files = sorted({file for pattern in CARRIED for file in source.glob(pattern) if file.is_file()})
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    return [str(file.relative_to(source)) for file in files]


def require_new(target: Path, key: str) -> None:
    """ValueError unless the folder `target` can be made: it is not there, or empty, and its parent can be written."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{key}={target} is a file; name a new folder")
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{key}={target} is not empty; nothing is overwritten, name a new folder")
    parent = next(p for p in target.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{key}={target} cannot be written: {parent} is not a folder you may write to; name another")
