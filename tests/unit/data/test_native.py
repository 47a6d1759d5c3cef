"""The compiled reader gives the same results and errors as the numpy reader."""

import copy
import struct
from pathlib import Path

import numpy as np
import pytest

from megalite.data import native
from megalite.data.indexed import IndexedDataset, IndexedWriter
from megalite.data.native import open_indexed


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_readers_agree(tmp_path: Path, dtype: str):
    random = np.random.default_rng(1)
    with IndexedWriter(tmp_path / "out", dtype=dtype) as writer:
        for size in (4, 0, 1, 300):
            writer.add_document(random.integers(100, size=size))
    one, two = (open_indexed(tmp_path / "out", reader) for reader in ("numpy", "cpp"))
    assert type(one) is IndexedDataset
    assert type(two) is native.NativeDataset
    for name in ("dtype", "num_sequences", "num_documents", "num_tokens", "prefix", "sidecar"):
        assert getattr(one, name) == getattr(two, name)
    for name in ("lengths", "offsets", "documents", "document_starts"):
        assert np.array_equal(getattr(one, name), getattr(two, name))
        assert getattr(one, name).dtype == getattr(two, name).dtype
    assert one.max_token() == two.max_token()
    assert np.array_equal(one.tokens(3, 200), two.tokens(3, 200))
    assert two.tokens(3, 200).dtype == np.dtype(dtype)
    assert all(np.array_equal(one[i], two[i]) for i in range(4))


def test_empty_stream(tmp_path: Path):
    with IndexedWriter(tmp_path / "out", 10):
        pass
    data = open_indexed(tmp_path / "out", "cpp")
    assert (data.num_tokens, data.num_documents, data.max_token()) == (0, 0, -1)
    assert data.tokens(0, 0).size == data.document_starts.size == 0


def test_largest_token_beyond_the_first_chunk(tmp_path: Path):
    tokens = np.arange(2**20 + 10) % 251
    tokens[-1] = 255
    with IndexedWriter(tmp_path / "out", dtype="uint8") as writer:
        writer.add_document(tokens)
    assert open_indexed(tmp_path / "out", "cpp").max_token() == 255


@pytest.mark.parametrize(
    ("at", "field"),
    [
        (9, struct.pack("<Q", 2)),
        (17, b"\x09"),
        (18, struct.pack("<Q", 4)),
        (34, struct.pack("<i", -3)),
        (54, struct.pack("<q", -6)),
        (54, struct.pack("<q", 2**63 - 1)),
        (62, struct.pack("<q", 10)),
        (70, struct.pack("<q", 1)),
        (94, struct.pack("<q", 2)),
        (78, struct.pack("<q", 4)),
    ],
)
def test_both_readers_report_damage_in_the_same_words(prefix: Path, at: int, field: bytes):
    idx = Path(f"{prefix}.idx")
    old = idx.read_bytes()
    idx.write_bytes(old[:at] + field + old[at + len(field) :])
    told = []
    for reader in ("numpy", "cpp"):
        with pytest.raises(ValueError, match="the file is damaged or of another kind") as caught:
            open_indexed(prefix, reader)
        told.append(str(caught.value))
    assert told[0] == told[1]


def test_no_single_flipped_byte_crashes(prefix: Path):
    """With any byte of the index changed, both readers raise an error or return the same."""
    idx = Path(f"{prefix}.idx")
    old = idx.read_bytes()
    for at in range(len(old)):
        for flip in (0x01, 0x80, 0xFF):
            idx.write_bytes(old[:at] + bytes([old[at] ^ flip]) + old[at + 1 :])
            verdicts: list[object] = []
            for reader in ("numpy", "cpp"):
                try:
                    data = open_indexed(prefix, reader)
                    verdicts.append(([data[i].tolist() for i in range(len(data))], data.documents.tolist()))
                except ValueError:
                    verdicts.append("refused")
            assert verdicts[0] == verdicts[1], (at, flip)


def test_truncated_or_missing_files(prefix: Path):
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    whole = idx.read_bytes()
    for size in (0, 10, 33, 34, 60, 101):
        idx.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"some\.idx: is {size} bytes, (shorter|expected)"):
            open_indexed(prefix, "cpp")
    idx.write_bytes(b"TNTIDX" + whole[6:])
    with pytest.raises(ValueError, match="MMIDIDX"):
        open_indexed(prefix, "cpp")
    idx.write_bytes(whole)
    bin_.write_bytes(bin_.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"some\.bin: is 12 bytes, expected 14"):
        open_indexed(prefix, "cpp")
    bin_.unlink()
    with pytest.raises(ValueError, match=r"some\.bin: no such file"):
        open_indexed(prefix, "cpp")


@pytest.mark.parametrize("reader", ["numpy", "cpp"])
def test_files_of_other_kinds_are_refused_by_name(prefix: Path, reader: str):
    idx = Path(f"{prefix}.idx")
    old = idx.read_bytes()
    for code, name in ((6, "float64"), (7, "float32")):
        idx.write_bytes(old[:17] + bytes([code]) + old[18:])
        with pytest.raises(
            ValueError, match=rf"some\.idx: contains {name} numbers \(dtype code {code}\), but token ids"
        ):
            open_indexed(prefix, reader)
    for modes in (bytes(3), bytes([0, 1, 0])):  # of Megatron-LM's multimodal datasets
        idx.write_bytes(old + modes)
        with pytest.raises(ValueError, match=r"some\.idx: is a multimodal index, with a mode for each of its 3"):
            open_indexed(prefix, reader)


@pytest.mark.parametrize("reader", ["numpy", "cpp"])
def test_tokens_cut_short_while_open_are_an_error(prefix: Path, reader: str):
    data = open_indexed(prefix, reader)
    with Path(f"{prefix}.bin").open("r+b") as file:
        file.truncate(4)
    assert data.tokens(0, 2).tolist() == [5, 6]
    with pytest.raises(ValueError, match="truncated while in use"):
        data.tokens(0, 3)
    with pytest.raises(ValueError, match="truncated while in use"):
        data.max_token()


def test_sequences_out_of_order_have_no_flat_stream(prefix: Path):
    idx = Path(f"{prefix}.idx")
    old = idx.read_bytes()
    idx.write_bytes(old[:46] + struct.pack("<3q", 8, 6, 0) + old[70:])
    data = open_indexed(prefix, "cpp")
    assert data[0].tolist() == [9, 10, 2]
    for ask in (lambda: data.tokens(0, 1), lambda: data.document_starts, lambda: data.max_token()):
        with pytest.raises(ValueError, match="not back to back"):
            ask()


def test_choice_of_reader(prefix: Path, monkeypatch: pytest.MonkeyPatch):
    assert type(open_indexed(prefix)) is native.NativeDataset
    assert copy.copy(open_indexed(prefix)).tokens(0, 2).tolist() == [5, 6]
    monkeypatch.setattr(native, "compiled", lambda: None)
    native.preferred.cache_clear()
    assert type(open_indexed(prefix)) is IndexedDataset
    with pytest.raises(ValueError, match="not built; build it with `pip install"):
        open_indexed(prefix, "cpp")
    with pytest.raises(ValueError, match="reader='rust' is unknown"):
        open_indexed(prefix, "rust")  # type: ignore[arg-type]
    native.preferred.cache_clear()
