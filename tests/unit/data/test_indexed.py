import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from megalite.data.indexed import CHUNK, IndexedDataset, IndexedWriter, token_dtype


def patch(prefix: Path, at: int, field: bytes) -> None:
    idx = Path(f"{prefix}.idx")
    old = idx.read_bytes()
    idx.write_bytes(old[:at] + field + old[at + len(field) :])


def test_writer_writes_the_golden_bytes(golden: Path, tmp_path: Path):
    with IndexedWriter(tmp_path / "out", vocab_size=600) as writer:
        writer.add_document([5, 6, 7], [8])
        writer.add_document(np.array([9, 10, 2], dtype=np.int32))
        writer.add_document()
    assert (tmp_path / "out.bin").read_bytes() == Path(f"{golden}.bin").read_bytes()
    assert (tmp_path / "out.idx").read_bytes() == Path(f"{golden}.idx").read_bytes()


def test_reader_reads_the_golden_bytes(golden: Path):
    data = IndexedDataset(golden)
    assert data.dtype == np.uint16
    assert (data.num_sequences, data.num_documents, data.num_tokens, len(data)) == (3, 3, 7, 3)
    assert data.lengths.tolist() == [3, 1, 3]
    assert data.offsets.tolist() == [0, 6, 8]
    assert data.documents.tolist() == [0, 2, 3, 3]
    assert [data[i].tolist() for i in (0, 1, 2, -1)] == [[5, 6, 7], [8], [9, 10, 2], [9, 10, 2]]
    assert data.tokens(2, 6).tolist() == [7, 8, 9, 10]
    assert data.document_starts.tolist() == [0, 4, 7]
    assert data.max_token() == 10
    assert data.sidecar == {}


def test_tokens_are_a_copy_and_bounded(golden: Path):
    data = IndexedDataset(golden)
    data.tokens(0, 7)[:] = 0
    assert data.tokens(0, 1).tolist() == [5]
    for start, stop in ((-1, 2), (3, 2), (0, 8)):
        with pytest.raises(IndexError):
            data.tokens(start, stop)
    with pytest.raises(IndexError):
        data[3]


def test_another_file_of_the_same_name_is_not_read(golden: Path):
    data = IndexedDataset(golden)
    with IndexedWriter(golden, vocab_size=600) as writer:
        writer.add_document([1, 1, 1, 1, 1, 1, 1])
    assert data.tokens(0, 3).tolist() == [5, 6, 7]
    assert pickle.loads(pickle.dumps(IndexedDataset(golden))).tokens(0, 3).tolist() == [1, 1, 1]


def test_a_damaged_sidecar(golden: Path):
    for content in (b"{", b"[]", b"\xff", b"[" * 100_000):
        Path(f"{golden}.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"golden\.json: .*write it again"):
            IndexedDataset(golden).sidecar  # noqa: B018


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(2, "uint16"), (65499, "uint16"), (65500, "int32"), (129280, "int32")]
)
def test_dtype_follows_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: str):
    assert token_dtype(vocab_size) == np.dtype(dtype)
    with IndexedWriter(tmp_path / "out", vocab_size) as writer:
        writer.add_document([0, vocab_size - 1])
    data = IndexedDataset(tmp_path / "out")
    assert (data.dtype, data.max_token()) == (np.dtype(dtype), vocab_size - 1)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_every_integer_type_comes_back(tmp_path: Path, dtype: str):
    random = np.random.default_rng(1)
    documents = [random.integers(100, size=size) for size in (4, 0, 1, 300)]
    with IndexedWriter(tmp_path / "out", dtype=dtype) as writer:
        for tokens in documents:
            writer.add_document(tokens)
    data = IndexedDataset(tmp_path / "out")
    assert data.dtype == np.dtype(dtype)
    assert [data[i].tolist() for i in range(4)] == [tokens.tolist() for tokens in documents]
    assert data.document_starts.tolist() == [0, 4, 4, 5]


def test_empty_stream(tmp_path: Path):
    with IndexedWriter(tmp_path / "out", 10):
        pass
    data = IndexedDataset(tmp_path / "out")
    assert (data.num_tokens, data.num_documents, data.max_token()) == (0, 0, -1)
    assert data.tokens(0, 0).size == data.document_starts.size == 0


def test_streams_longer_than_a_chunk(tmp_path: Path):
    long = np.arange(CHUNK + 10) % 251
    with IndexedWriter(tmp_path / "out", dtype="uint8") as writer:
        writer.add_document(long)
    data = IndexedDataset(tmp_path / "out")
    assert [(start, len(tokens)) for start, tokens in data.chunks()] == [(0, CHUNK), (CHUNK, 10)]
    assert data.max_token() == 250


def test_an_aborted_writer_leaves_nothing(tmp_path: Path):
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "out", 10) as writer:  # noqa: PT012
        writer.add_document([1])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_nothing_has_its_final_name_before_close_and_the_old_files_stay(golden: Path):
    writer = IndexedWriter(golden, 20)
    writer.add_document([1])
    assert IndexedDataset(golden).num_tokens == 7
    writer.sidecar = {"documents": 1, "name": "诗"}
    writer.close()
    assert IndexedDataset(golden).num_tokens == 1
    assert IndexedDataset(golden).sidecar == {"documents": 1, "name": "诗"}
    assert {path.name for path in golden.parent.iterdir()} == {"golden.bin", "golden.idx", "golden.json"}


def test_a_failing_close_cleans_up(tmp_path: Path):
    writer = IndexedWriter(tmp_path / "out", 10)
    writer.sidecar = {"tokens": object()}
    with pytest.raises(TypeError):
        writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 10], r"document 1: token 10 is outside 0\.\.9"),
        ([-1], r"token -1 is outside"),
        ([[1]], r"shape \(1, 1\)"),
        ([0.5], "float64"),
    ],
)
def test_writer_refuses_invalid_tokens(tmp_path: Path, tokens: list, message: str):
    with IndexedWriter(tmp_path / "out", 10) as writer:
        writer.add_document([1])
        with pytest.raises(ValueError, match=message):
            writer.add_document(tokens)


@pytest.mark.parametrize("settings", [{}, {"vocab_size": 5, "dtype": "int32"}, {"dtype": "float32"}])
def test_writer_refuses_its_settings(tmp_path: Path, settings: dict):
    with pytest.raises(ValueError, match=r"vocab_size|dtype"):
        IndexedWriter(tmp_path / "out", **settings)


def test_sequences_out_of_order_have_no_flat_stream(golden: Path):
    patch(golden, 46, struct.pack("<3q", 8, 6, 0))
    data = IndexedDataset(golden)
    assert data[0].tolist() == [9, 10, 2]
    for ask in (lambda: data.tokens(0, 1), lambda: data.document_starts):
        with pytest.raises(ValueError, match="not back to back"):
            ask()
