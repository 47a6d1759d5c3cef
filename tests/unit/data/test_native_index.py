"""megalite._index by itself: its reader, and its index builders against Megatron-LM's vectors."""

import gc
import importlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

_index = importlib.import_module("megalite._index")  # no stubs: mypy takes it as Any


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
        with pytest.raises(IndexError, match="outside the stream of 7 tokens"):
            reader.tokens(start, stop)
    for sequence in (3, -4):
        with pytest.raises(IndexError, match=f"sequence {sequence} is outside the 3 sequences"):
            reader[sequence]


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
    """Walking the rows as Megatron-LM's dataset does returns the concatenated documents."""
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
    with pytest.raises(ValueError, match=r"order\[1\]=4 is not one of the 4 documents"):
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
