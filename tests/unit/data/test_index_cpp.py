"""The compiled reader against the numpy one, and the index builders against Megatron-LM's vectors."""

import copy
import gc
import importlib
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megalite.data import native
from megalite.data.indexed import IndexedDataset, IndexedWriter
from megalite.data.native import open_indexed

_index = importlib.import_module("megalite._index")  # no stubs: mypy takes it as Any


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Documents [[5,6,7],[8]], [[9,10,2]], [] as u16."""
    with IndexedWriter(tmp_path / "some", vocab_size=600) as writer:
        writer.add_document([5, 6, 7], [8])
        writer.add_document([9, 10, 2])
        writer.add_document()
    return tmp_path / "some"


def test_reads_what_was_written(prefix: Path):
    reader = _index.Reader(str(prefix))
    assert (reader.num_sequences, reader.num_documents, reader.num_tokens, len(reader)) == (3, 3, 7, 3)
    assert reader.dtype == np.uint16
    assert reader.lengths.tolist() == [3, 1, 3]
    assert reader.offsets.tolist() == [0, 6, 8]
    assert reader.documents.tolist() == [0, 2, 3, 3]
    assert [reader[i].tolist() for i in (0, 1, 2, -1)] == [[5, 6, 7], [8], [9, 10, 2], [9, 10, 2]]
    assert reader.tokens(2, 6).tolist() == [7, 8, 9, 10]
    assert reader.tokens(7, 7).tolist() == []
    assert reader.max_token() == 10


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


def test_tables_are_views_that_keep_the_reader_alive(prefix: Path):
    reader = _index.Reader(str(prefix))
    lengths = reader.lengths
    assert not lengths.flags.owndata
    del reader
    gc.collect()
    assert lengths.tolist() == [3, 1, 3]
    with pytest.raises(ValueError, match="read-only"):
        lengths[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        lengths.setflags(write=True)


def test_tokens_are_bounded_copies(prefix: Path):
    reader = _index.Reader(str(prefix))
    reader.tokens(0, 7)[:] = 0
    assert reader.tokens(0, 1).tolist() == [5]
    for start, stop in ((-1, 2), (3, 2), (0, 8), (-(2**63), 2**63 - 1)):
        with pytest.raises(IndexError, match="of a stream of 7"):
            reader.tokens(start, stop)
    for sequence in (3, -4):
        with pytest.raises(IndexError, match=f"sequence {sequence} of 3"):
            reader[sequence]


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
def test_damage_is_told_in_the_same_words(prefix: Path, at: int, field: bytes):
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
    """Every byte of the index, changed: an error, or the same verdict as the numpy reader's."""
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
        with pytest.raises(ValueError, match=rf"some\.idx: holds {name} numbers \(dtype code {code}\), and token ids"):
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
    with pytest.raises(ValueError, match="cut short while in use"):
        data.tokens(0, 3)
    with pytest.raises(ValueError, match="cut short while in use"):
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


LENGTHS = np.array([5, 0, 7, 4], dtype=np.int32)


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, [[0, 0], [0, 4], [2, 3], [3, 0]]),
        ({"extra_token": False}, [[0, 0], [0, 4], [2, 3], [2, 7], [3, 4]]),
        ({"keep_last": True}, [[0, 0], [0, 4], [2, 3], [3, 0], [3, 3]]),
        ({"keep_last": True, "extra_token": False}, [[0, 0], [0, 4], [2, 3], [2, 7], [3, 4]]),
    ],
)
def test_sample_index_of_megatron(settings: dict, rows: list):
    got = _index.build_sample_idx(LENGTHS, np.arange(4), 4, **settings)
    assert got.dtype == np.int64
    assert got.tolist() == rows


@pytest.mark.parametrize("extra", [0, 1])
def test_samples_cover_the_stream(extra: int):
    """Walking the rows as Megatron's dataset does gives back the concatenated documents."""
    random = np.random.default_rng(0)
    lengths = random.integers(0, 9, 40).astype(np.int32)
    documents = [100 * d + np.arange(n) for d, n in enumerate(lengths)]
    order = np.concatenate([random.permutation(40) for _ in range(3)])
    stream = np.concatenate([documents[d] for d in order])
    rows = _index.build_sample_idx(lengths, order, 16, bool(extra), True).tolist()
    assert len(rows) - 1 == -(-(len(stream) - extra) // 16)
    for k, ((first, start), (last, end)) in enumerate(pairwise(rows)):
        parts = [documents[d] for d in order[first : last + 1]]
        parts[-1] = parts[-1][: end + extra]
        parts[0] = parts[0][start:]
        assert np.array_equal(np.concatenate(parts), stream[16 * k : 16 * (k + 1) + extra])


def test_sample_index_at_the_edges(prefix: Path):
    empty = np.zeros(0, dtype=np.int32)
    assert _index.build_sample_idx(empty, np.arange(0), 4, keep_last=True).tolist() == [[0, 0]]
    assert _index.build_sample_idx(LENGTHS, np.arange(4), 16).tolist() == [[0, 0]]
    assert _index.build_sample_idx(LENGTHS, np.arange(4), 15).tolist() == [[0, 0], [3, 3]]
    # An empty last document: Megatron's kept-last row would be at offset -1 of it.
    kept = _index.build_sample_idx(np.array([6, 0], np.int32), np.arange(2), 4, keep_last=True)
    assert kept.tolist() == [[0, 0], [0, 4], [0, 5]]
    unaligned = _index.Reader(str(prefix)).lengths
    assert _index.build_sample_idx(unaligned, np.arange(3), 3).tolist() == [[0, 0], [1, 0], [2, 2]]
    with pytest.raises(ValueError, match=r"order\[1\]=4 is not one of 4 documents"):
        _index.build_sample_idx(LENGTHS, np.array([0, 4]), 4)
    with pytest.raises(ValueError, match="seq_len=0"):
        _index.build_sample_idx(LENGTHS, np.arange(4), 0)
    with pytest.raises(TypeError):
        _index.build_sample_idx(LENGTHS.astype(float), np.arange(4), 4)


def test_blending_of_megatron():
    datasets, samples = _index.build_blending_indices([0.5, 0.3, 0.2], 12)
    assert datasets.dtype == samples.dtype == np.int64
    assert datasets.tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0, 0, 1]
    assert samples.tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4, 5, 3]
    datasets, samples = _index.build_exhaustive_blending_indices([3, 2, 1])
    assert datasets.tolist() == [0, 1, 2, 0, 1, 0]
    assert samples.tolist() == [0, 0, 0, 1, 1, 2]


def test_blending_at_the_edges():
    assert _index.build_blending_indices([1.0], 0)[0].size == 0
    assert _index.build_exhaustive_blending_indices([0, 2, 0])[0].tolist() == [1, 1]
    assert _index.build_exhaustive_blending_indices([])[0].size == 0
    for weights in ([], [0.5], [1.5, -0.5], [0.0, 1.0], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="above 0 and sum to 1"):
            _index.build_blending_indices(weights, 4)
    with pytest.raises(ValueError, match="size=-1"):
        _index.build_blending_indices([1.0], -1)
