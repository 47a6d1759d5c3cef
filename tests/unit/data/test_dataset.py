import numpy as np
import pytest

from megalite.data.dataset import PretrainDataset, Spread, WindowDataset, check_vocabulary, heldout_windows
from megalite.data.indexed import IndexedDataset


def brute_force_bounds(data: IndexedDataset, start: int, seq_len: int) -> list[list[int]]:
    """Walks the documents token by token."""
    document_of = [number for number in range(data.num_documents) for _ in range(data.lengths[number])]
    bounds = []
    for i in range(seq_len):
        first = i
        while first > 0 and document_of[start + first - 1] == document_of[start + i]:
            first -= 1
        bounds.append([first, i + 1])
    return bounds


def test_pretrain_sample_is_the_window_of_the_order(noise: IndexedDataset):
    data = PretrainDataset(noise, seq_len=16, seed=7)
    stream = noise.tokens(0, noise.num_tokens)
    batch = data.batch([0, 5, len(data) + 3])
    for row, sample in enumerate([0, 5, len(data) + 3]):
        start = data.order[sample][1] * 16
        np.testing.assert_array_equal(batch.tokens[row], stream[start : start + 16])
        np.testing.assert_array_equal(batch.labels[row], stream[start + 1 : start + 17])
    assert batch.loss_mask.all()
    assert batch.positions.tolist() == [list(range(16))] * 3
    assert batch.bounds is None
    assert (batch.tokens.dtype, batch.labels.dtype, batch.positions.dtype) == (np.int64,) * 3
    assert batch.loss_mask.dtype == np.float32
    assert batch.tokens.flags.c_contiguous
    assert batch.labels.flags.c_contiguous


def test_an_epoch_predicts_each_token_at_most_once(write):
    data = PretrainDataset(write(list(range(100))), seq_len=9, seed=0)
    labels = data.batch(range(len(data))).labels
    assert sorted(labels.ravel().tolist()) == list(range(1, 100))


def test_bounds_and_positions_come_from_the_documents(noise: IndexedDataset):
    data = PretrainDataset(noise, seq_len=24, seed=1, isolate_documents=True)
    batch = data.batch(range(len(data)))
    assert batch.bounds is not None
    for sample in range(len(data)):
        expected = brute_force_bounds(noise, data.order[sample][1] * 24, 24)
        assert batch.bounds[sample].tolist() == expected
        assert batch.positions[sample].tolist() == [i - first for i, (first, _) in enumerate(expected)]
    layout = data.layout(range(len(data)))
    np.testing.assert_array_equal(layout.bounds, batch.bounds)
    np.testing.assert_array_equal(layout.positions, batch.positions)


def test_layout_reads_no_token(noise: IndexedDataset):
    PretrainDataset(noise, 24, 1, isolate_documents=True).layout([0, 1])
    assert "_data" not in vars(noise)


def test_bounds_ignore_token_values(write):
    same = PretrainDataset(write([2, 2, 2], [], [2, 2, 2]), seq_len=5, seed=0, isolate_documents=True)
    assert same.layout([0]).positions.tolist() == [[0, 1, 2, 0, 1]]


def test_eod_mask_loss_spares_the_first_token_of_a_document(write):
    data = WindowDataset(write([5, 6, 2], [7, 2], [8, 9, 2]), 4, eod_mask_loss=True)
    batch = data.batch([0, 1])
    assert batch.labels.tolist() == [[6, 2, 7, 2], [8, 9, 2, 0]]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 1], [0, 1, 1, 0]]


@pytest.mark.parametrize("seq_len", [1, 3, 4, 9, 10, 50])
def test_heldout_predicts_every_token_but_the_first_once(write, seq_len: int):
    data = heldout_windows(write(list(range(10, 17)), list(range(17, 20))), seq_len)
    batch = data.batch(range(len(data)))
    kept = batch.loss_mask.astype(bool)
    assert batch.labels[kept].tolist() == list(range(11, 20))
    assert batch.tokens[kept].tolist() == list(range(10, 19))
    assert (batch.labels[~kept] == 0).all()
    assert batch.tokens.shape == (len(data), seq_len)


def test_heldout_rows_past_the_end_are_masked(noise: IndexedDataset):
    data = heldout_windows(noise, 16, isolate_documents=True)
    batch = data.batch([len(data) - 1, len(data), len(data) + 7])
    assert batch.loss_mask[0].any()
    assert not batch.loss_mask[1:].any()
    assert not batch.tokens[1:].any()


def test_too_little_data(write):
    with pytest.raises(ValueError, match="has 3 tokens, but one sample of seq_len=8 needs 9"):
        PretrainDataset(write([1, 2, 3]), 8, 0)
    with pytest.raises(ValueError, match="has 1 tokens, but one prediction needs 2"):
        heldout_windows(write([1]), 8)


def test_check_vocabulary_names_the_token(write):
    data = write([1, 2, 3], [4, 612, 700])
    check_vocabulary(data, 701)
    with pytest.raises(ValueError, match=r"token 612 at position 4 \(document 1\).*vocab_size=600.*largest.* is 700"):
        check_vocabulary(data, 600)


@pytest.mark.parametrize(("length", "count"), [(1, 1), (7, 7), (13, 4), (100, 9), (240, 239)])
def test_a_spread_takes_samples_of_the_whole_set_once(write, length: int, count: int):
    data = heldout_windows(write(list(range(length * 4 + 1))), seq_len=4)
    spread = Spread(data, count)
    assert (len(data), len(spread)) == (length, count)
    starts = spread.batch(range(count)).tokens[:, 0] // 4
    assert len(set(starts.tolist())) == count
    gaps = np.diff([-1, *starts, length])
    assert gaps.max() <= -(-length // count) + 1
    assert gaps.min() >= 1
    one_by_one = [spread.batch([index]).tokens[0, 0] // 4 for index in range(count)]
    assert one_by_one == starts.tolist()
    assert not spread.batch([count, count + 1]).loss_mask.any()
    assert spread.layout([0]).positions.tolist() == [[0, 1, 2, 3]]
