"""What is wrong with a folder is told by name, before a weight is read; no pickle is opened."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from folders import Make, change
from safetensors.torch import load_file, save_file

from megalite.config.shapes import shapes
from megalite.exchange.hf_folder import INDEX, SINGLE, carry, find_tokenizer, open_folder, require_new
from megalite.model.layouts import to_hf
from megalite.model.names import hf_shapes


@pytest.fixture
def folder(folder_of: Make, tmp_path: Path) -> Path:
    """A Llama's folder that a test may change."""
    return Path(shutil.copytree(folder_of("Llama"), tmp_path / "model"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / SINGLE)


def split(folder: Path) -> dict[str, str]:
    """The weights in two files and an index; gives its weight_map."""
    whole = tensors(folder)
    (folder / SINGLE).unlink()
    names = sorted(whole)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, keys in parts.items():
        save_file({key: whole[key] for key in keys}, folder / file, {"format": "pt"})
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        open_folder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "GPT2"])
def test_shapes_are_those_of_the_tensors(family: str, folder_of: Make) -> None:
    opened = open_folder(folder_of(family))
    assert {name: stored.shape for name, stored in opened.tensors.items()} == hf_shapes(opened.model)
    made: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes(opened.model).items():
        made |= {key: tuple(t.shape) for key, t in to_hf(name, torch.empty(shape), opened.model).items()}
    assert made == hf_shapes(opened.model)


def test_shards_are_read_by_their_index(folder: Path) -> None:
    single = open_folder(folder).tensors
    split(folder)
    opened = open_folder(folder).tensors
    assert opened.keys() == single.keys()
    assert {stored.file.name for stored in opened.values()} == {"a.safetensors", "b.safetensors"}


def test_a_bare_model_and_old_buffers(folder: Path, folder_of: Make, tmp_path: Path) -> None:
    bare = {key.removeprefix("model."): value for key, value in tensors(folder).items()}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(bare, folder / SINGLE)
    assert open_folder(folder).tensors["model.embed_tokens.weight"].key == "embed_tokens.weight"
    gpt2 = shutil.copytree(folder_of("GPT2"), tmp_path / "gpt2")
    old = {key.removeprefix("transformer."): value for key, value in tensors(gpt2).items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.uint8)
    save_file(old, gpt2 / SINGLE)
    assert len(open_folder(gpt2).tensors) == len(old) - 1


def test_a_stored_copy_of_a_tied_matrix(folder_of: Make, tmp_path: Path) -> None:
    folder = shutil.copytree(folder_of("Qwen2"), tmp_path / "tied")
    whole = tensors(folder)
    whole["lm_head.weight"] = whole["model.embed_tokens.weight"].clone()
    save_file(whole, folder / SINGLE)
    assert "lm_head.weight" not in open_folder(folder).tensors
    whole["lm_head.weight"][3, 3] += 1
    save_file(whole, folder / SINGLE)
    refused(folder, "lm_head.weight differs from model.embed_tokens.weight")


def test_a_pickle_is_never_opened(folder: Path, tmp_path: Path) -> None:
    (folder / SINGLE).unlink()

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "opened",)  # type: ignore[return-value]

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    refused(folder, "pytorch_model.bin: a pickle, which can run code when opened")
    assert not (tmp_path / "opened").exists()


def test_missing_extra_and_misshapen(folder: Path) -> None:
    whole = tensors(folder)
    lost = {key: value for key, value in whole.items() if "layers.2.self_attn" not in key}
    save_file(lost, folder / SINGLE)
    refused(folder, "tensors model.layers.2.self_attn.q_proj.weight, model.layers.2.self_attn.k_proj.weight, "
                    "model.layers.2.self_attn.v_proj.weight and 1 more are missing")  # fmt: skip
    save_file(whole | {"model.layers.0.mlp.gate_proj.bias": torch.zeros(56)}, folder / SINGLE)
    refused(folder, "tensor model.layers.0.mlp.gate_proj.bias is not part of config.json's model")
    save_file(whole | {"model.norm.weight": torch.zeros(31)}, folder / SINGLE)
    refused(folder, "tensor model.norm.weight is [31], config.json's model has [32]")
    save_file(whole, folder / SINGLE)
    change(folder, "config.json", num_hidden_layers=3)
    refused(folder, "not part of config.json's model")


def test_quantised_weights_and_settings(folder: Path) -> None:
    whole = tensors(folder)
    save_file(whole | {"model.norm.weight": torch.zeros(32, dtype=torch.int8)}, folder / SINGLE)
    refused(folder, "tensor model.norm.weight is I8; megalite reads F32, BF16, F16, F64, not quantised weights")
    change(folder, "config.json", quantization_config={"quant_method": "gptq"})
    refused(folder, 'quantization_config={"quant_method": "gptq"} is not supported')


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ""])
def test_an_index_names_files_of_its_folder(folder: Path, name: str) -> None:
    weight_map = split(folder)
    shutil.copyfile(folder / "a.safetensors", folder.parent / "a.safetensors")
    weight_map["model.norm.weight"] = name
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, f"{json.dumps(name)} is not the plain name of a file in the folder")


def test_files_linked_from_another_folder(folder: Path, tmp_path: Path) -> None:
    """As `hf download --local-dir` once linked into its cache, and as people share weights."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in folder.iterdir():
        (linked / file.name).symlink_to(file)
    assert open_folder(linked).tensors.keys() == open_folder(folder).tensors.keys()
    assert "tokenizer.json" in carry(linked, tmp_path / "kept")
    assert not any(file.is_symlink() for file in (tmp_path / "kept").iterdir())
    (folder / SINGLE).rename(folder / "gone")
    refused(linked, f"{SINGLE}: a link to {folder / SINGLE}, which is not a file")


def test_the_layout_of_hugging_faces_cache_is_opened(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"{i}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{i}")
    assert len(open_folder(snapshot).tensors) == 39
    assert "chat_template.jinja" in carry(snapshot, tmp_path / "kept")
    assert not any(file.is_symlink() for file in (tmp_path / "kept").iterdir())


def test_a_whole_file_comes_before_a_stale_index(folder: Path) -> None:
    """save_pretrained over a folder of shards leaves the index, and sometimes the shards, of the model before."""
    whole = tensors(folder)
    split(folder)
    save_file({key: value + 1 for key, value in whole.items()}, folder / SINGLE, {"format": "pt"})
    assert {stored.file.name for stored in open_folder(folder).tensors.values()} == {SINGLE}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
    assert torch.equal(theirs, whole["lm_head.weight"] + 1)
    for shard in ("a.safetensors", "b.safetensors"):
        (folder / shard).unlink()
    assert {stored.file.name for stored in open_folder(folder).tensors.values()} == {SINGLE}


def test_a_head_that_is_missing_names_the_key(folder: Path) -> None:
    save_file({key: value for key, value in tensors(folder).items() if key != "lm_head.weight"}, folder / SINGLE)
    change(folder, "config.json", tie_word_embeddings=...)
    refused(folder, 'write "tie_word_embeddings": true there')
    change(folder, "config.json", tie_word_embeddings=True)
    assert open_folder(folder).model.tie_embeddings


HEADER = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "[]",
        "null",
        '{"x"',
        *(json.dumps({"x": entry}) for entry in (None, [], 3, {}, HEADER | {"dtype": ["F32"]}, HEADER | {"dtype": 4})),
        *(json.dumps({"x": HEADER | {"shape": shape}}) for shape in (None, 2, [-1, -2], [2.0], [True, 2], ["2"])),
        *(
            json.dumps({"x": HEADER | {"data_offsets": offsets}})
            for offsets in (None, 8, [0], [0, 8, 8], [8, 0], [-8, 0], [0.0, 8.0], [False, 8], ["0", "8"], [0, 10**40])
        ),
        json.dumps({"x": HEADER, "y": HEADER}),  # overlapping
        json.dumps({"x": HEADER | {"data_offsets": [4, 12]}}),  # a gap
        json.dumps({"model.layers.0.self_attn.rotary_emb.inv_freq": HEADER | {"data_offsets": [8, 16]}}),
        json.dumps({"x\ny": HEADER | {"dtype": "F8_E4M3"}}),
    ],
)  # fmt: skip
def test_headers_that_are_damaged(folder: Path, header: str) -> None:
    text = header.encode()
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    refused(folder, f"{SINGLE}: ")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[" * 100_000, f"{INDEX}: not usable JSON (nested too deeply)"),
        ('{"weight_map": {"x": null}}', f"{INDEX}: has no weight_map"),
        ('{"weight_map": ["x"]}', f"{INDEX}: has no weight_map"),
        ('{"weight_map": {"x": "a\\u0000b"}}', "download it again"),
        ('{"weight_map": {"x": "\\ud800"}}', "download it again"),
        (json.dumps({"weight_map": {"x": "a" * 300}}), "is not the plain name of a file"),
    ],
)
def test_an_index_that_is_damaged(folder: Path, index: str, message: str) -> None:
    split(folder)
    (folder / INDEX).write_text(index)
    refused(folder, message)


def test_a_file_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    refused(folder, f"{SINGLE}: cannot be read (Permission denied); check its permissions")


def test_a_missing_shard_and_a_wrong_index(folder: Path) -> None:
    weight_map = split(folder)
    (folder / "b.safetensors").rename(folder / "c")
    refused(folder, "b.safetensors: no such file")
    (folder / "c").rename(folder / "b.safetensors")
    weight_map["model.norm.weight"] = "a.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, "tensor model.norm.weight is not in the file it names")
    (folder / INDEX).write_text("{}")
    refused(folder, "has no weight_map")


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_a_file_cut_short(folder: Path, keep: int) -> None:
    file = folder / SINGLE
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, f"{SINGLE}: ")


def test_no_weights_no_config_no_folder(folder: Path) -> None:
    (folder / SINGLE).unlink()
    refused(folder, f"holds neither {SINGLE} nor {INDEX}")
    (folder / "config.json").unlink()
    refused(folder, "config.json: no such file")
    refused(folder / "x", "no such folder")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "a peft adapter, not a model; import it with convert --from peft")


def test_what_goes_along(folder: Path, tmp_path: Path) -> None:
    (folder / "notes.py").write_text("raise SystemExit")
    (folder / "LICENSE.txt").write_text("words")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    names = carry(folder, tmp_path / "kept")
    assert {"config.json", "LICENSE.txt", "additional_chat_templates/tool.jinja", "tokenizer.json"} <= set(names)
    assert not {"notes.py", SINGLE} & set(names)
    assert find_tokenizer(folder) == folder / "tokenizer.json"
    assert find_tokenizer(tmp_path) is None


def test_a_new_folder_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    require_new(tmp_path / "a" / "b", "--to")
    with pytest.raises(ValueError, match="is a file"):
        require_new(tmp_path / "file", "--to")
    with pytest.raises(ValueError, match="not empty"):
        require_new(tmp_path, "--to")
    with pytest.raises(ValueError, match="cannot be written"):
        require_new(tmp_path / "file" / "x", "--to")
