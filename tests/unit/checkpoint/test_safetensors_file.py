"""Headers of safetensors files: bytes as the library writes them, and every damage refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite.checkpoint.safetensors_file import METADATA, Entry, UnknownDtype, make_header, read_header
from megalite.config.dtypes import DTYPES

HEADER = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def test_a_header_is_the_librarys(tmp_path: Path) -> None:
    # in the order that the library gives to tensors of several dtypes: wide ones first
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7).bfloat16(), "c": torch.randn(1, 1, 3).half()}
    save_file(tensors, tmp_path / "theirs", metadata=METADATA)
    order = list(read(tmp_path / "theirs"))
    rows = {"a": DTYPES["bf16"], "b": DTYPES["fp32"], "c": DTYPES["fp16"]}
    header, size = make_header({key: (rows[key], tensors[key].shape) for key in order})
    raw = (tmp_path / "theirs").read_bytes()
    assert json.loads(header[8:]) == json.loads(raw[8 : len(raw) - size])
    assert len(header) % 8 == 0
    values = b"".join(bytes(tensors[key].flatten().view(torch.uint8).numpy()) for key in order)
    (tmp_path / "ours").write_bytes(header + values)
    assert all(torch.equal(x, tensors[key]) for key, x in load_file(tmp_path / "ours").items())


def read(path: Path, *unread: str) -> dict[str, Entry]:
    with open(path, "rb") as file:
        return read_header(file, lambda key: key in unread)


def test_entries_say_where_the_bytes_are(tmp_path: Path) -> None:
    header, size = make_header(
        {"x": (DTYPES["fp16"], (2, 3)), "empty": (DTYPES["fp64"], (0, 4)), "y": (DTYPES["fp32"], ())}
    )
    (tmp_path / "f").write_bytes(header + bytes(size))
    begin = len(header)
    assert read(tmp_path / "f") == {
        "x": Entry("F16", (2, 3), begin, begin + 12),
        "empty": Entry("F64", (0, 4), begin + 12, begin + 12),
        "y": Entry("F32", (), begin + 12, begin + 16),
    }


def file(tmp_path: Path, header: object, data: bytes = bytes(8)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return tmp_path / "f"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"x"', "is not JSON"),
        (b"\xff{}", "is not JSON"),
        ([], "not a JSON object"),
        (None, "not a JSON object"),
        *(({"x": entry}, "without a usable dtype") for entry in (None, [], 3, {}, HEADER | {"dtype": 4})),
        *(({"x": HEADER | {"shape": shape}}, "usable") for shape in (None, 2, [-1, -2], [2.0], [True, 2], ["2"])),
        *(({"x": HEADER | {"data_offsets": at}}, "usable") for at in (None, 8, [0], [0, 8, 8], [8, 0], [-8, 0])),
        ({"x": HEADER | {"data_offsets": [0, 10**40]}}, "usable"),
        ({"x": HEADER, "y": HEADER}, "tensor y is not where"),
        ({"x": HEADER | {"data_offsets": [4, 12]}}, "tensor x is not where"),
        ({"x": HEADER | {"shape": [3]}}, "tensor x is not where the header says, or of another size"),
        ({"x": HEADER | {"shape": [1], "data_offsets": [0, 4]}}, "has .* bytes, its header describes"),
        ({"x\ny": HEADER | {"dtype": "F8_E4M3"}}, r"^tensor x\\ny is F8_E4M3; megalite reads F32, BF16, F16, F64, not"),
    ],
)
def test_a_damaged_header_is_one_line(tmp_path: Path, header: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(file(tmp_path, header))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("keep", [0, 4, 8, 20, -1])
def test_a_file_cut_short(tmp_path: Path, keep: int) -> None:
    path = file(tmp_path, {"x": HEADER})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="cut short"):
        read(path)


def test_a_length_beyond_the_file_asks_for_no_memory(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=r"^not a safetensors file, or cut short: 10 bytes$"):
        read(tmp_path / "f")


def test_unread_tensors_may_be_of_any_dtype_and_are_left_out(tmp_path: Path) -> None:
    buffer = {"dtype": "BOOL", "shape": [4], "data_offsets": [8, 12]}
    path = file(tmp_path, {"x": HEADER, "mask": buffer}, bytes(12))
    assert list(read(path, "mask")) == ["x"]
    with pytest.raises(UnknownDtype):
        read(path)


def test_metadata_may_be_required(tmp_path: Path) -> None:
    path = file(tmp_path, {"__metadata__": {"format": "tf"}, "x": HEADER})
    assert list(read(path)) == ["x"]
    with open(path, "rb") as stream, pytest.raises(ValueError, match="__metadata__ is not what was written"):
        read_header(stream, metadata=METADATA)
