"""A manifest's summary: counts, bytes and lines."""

from pathlib import Path

import pytest
from checkpoints import TENSORS, step_state, write, write_tensors

from megalite.checkpoint.describe import describe, describe_lines, many, model_line, size, state_of, tensor_bytes
from megalite.checkpoint.folder import read_manifest

pytestmark = pytest.mark.usefixtures("any_tensors")


def test_tensors_are_counted_by_kind(tmp_path: Path) -> None:
    folder = write_tensors(tmp_path / "w")
    manifest = read_manifest(folder)
    what = describe(folder, manifest)
    assert what["kinds"] == {
        "weight": {
            "tensors": 4,
            "elements": 716,
            "bytes": 600 * 4 + 100 * 8 + 7 * 2 + 9 * 2,
            "dtypes": ["float32", "float64", "bfloat16", "float16"],
        },
        "exp_avg": {"tensors": 1, "elements": 4, "bytes": 16, "dtypes": ["float32"]},
    }
    assert what["bytes"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for name, x in TENSORS.items():
        assert tensor_bytes(manifest["tensors"][name]) == x.nbytes


def test_the_state_is_what_is_left_of_the_manifest(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, 4))
    assert state_of(manifest) == step_state(4)


def test_lines_are_for_people(tmp_path: Path) -> None:
    folder = write(tmp_path, 4)
    lines = describe_lines(describe(folder, read_manifest(folder)))
    assert lines[0] == str(folder)
    assert lines[1] == "  step       4, 32 samples consumed"
    assert "  data       corpus: 9 tokens" in lines
    assert "  weight     2 tensors, 128 elements, 512 bytes, float32" in lines


def test_a_model_in_one_line() -> None:
    model = {"num_layers": 2, "hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 24}
    expected = "2 layers, hidden 16, 4 heads over 2 kv heads, ffn 24, vocabulary 101"
    assert model_line(model | {"vocab_size": 101}) == expected
    assert model_line(model | {"vocab_size": 101, "tie_embeddings": True}) == expected + ", tied"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (1_620_000_000, "1.62 GB")]
)
def test_sizes_are_decimal(count: int, text: str) -> None:
    assert size(count) == text


def test_one_is_singular() -> None:
    assert [many(n, "file") for n in (0, 1, 2000)] == ["0 files", "1 file", "2,000 files"]
