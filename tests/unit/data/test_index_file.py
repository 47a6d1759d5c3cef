"""Damaged, truncated and foreign index files are refused by name."""

import struct
from pathlib import Path

import pytest

from megalite.data.indexed import IndexedDataset


def patch(prefix: Path, at: int, field: bytes) -> None:
    idx = Path(f"{prefix}.idx")
    old = idx.read_bytes()
    idx.write_bytes(old[:at] + field + old[at + len(field) :])


@pytest.mark.parametrize(
    ("at", "field", "message"),
    [
        (0, b"TNTIDX\0\0", r"starts with b'TNTIDX.*expected b'MMIDIDX"),
        (9, struct.pack("<Q", 2), "has version 2, expected 1"),
        (17, b"\x09", "dtype code 9, expected an integer type"),
        (18, struct.pack("<Q", 4), "is 102 bytes, expected 114 for 4 sequences and 4 document boundaries"),
        (34, struct.pack("<i", -3), "has length -3 at sequence 0"),
        (54, struct.pack("<q", -6), "has offset -6 at sequence 1"),
        (62, struct.pack("<q", 10), r"golden\.bin: is 14 bytes, expected 16 by its index of 7 uint16 tokens"),
        (70, struct.pack("<q", 1), "document index from 1 to 3, expected 0 to 3"),
        (94, struct.pack("<q", 2), "document index from 0 to 2, expected 0 to 3"),
        (78, struct.pack("<q", 4), "document index falling from 4 to 3 at document 1"),
    ],
)
def test_damaged_index(golden: Path, at: int, field: bytes, message: str):
    patch(golden, at, field)
    with pytest.raises(ValueError, match=message) as caught:
        IndexedDataset(golden)
    assert "\n" not in str(caught.value)
    assert "tools/preprocess_data.py" in str(caught.value)


@pytest.mark.parametrize("size", [0, 10, 33, 34, 60, 101])
def test_truncated_index(golden: Path, size: int):
    idx = Path(f"{golden}.idx")
    idx.write_bytes(idx.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"golden\.idx: is {size} bytes, (shorter|expected)"):
        IndexedDataset(golden)


def test_no_document_boundaries(golden: Path):
    idx = Path(f"{golden}.idx")
    idx.write_bytes(idx.read_bytes()[:9] + struct.pack("<QBQQ", 1, 8, 0, 0))
    with pytest.raises(ValueError, match="0 document boundaries"):
        IndexedDataset(golden)


def test_truncated_or_missing_tokens(golden: Path):
    bin_path = Path(f"{golden}.bin")
    bin_path.write_bytes(bin_path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"golden\.bin: is 12 bytes, expected 14"):
        IndexedDataset(golden)
    Path(f"{golden}.bin").unlink()
    with pytest.raises(ValueError, match=r"golden\.bin: no such file"):
        IndexedDataset(golden)
    with pytest.raises(ValueError, match=r"golden\.bin\.idx: no such file.*without the suffix"):
        IndexedDataset(f"{golden}.bin")
