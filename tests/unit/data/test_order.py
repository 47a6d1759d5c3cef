import pytest

from megalite.data.order import SampleOrder


def test_every_epoch_visits_every_window_once():
    order = SampleOrder(num_tokens=101, seq_len=10, seed=3)
    assert order.num_samples == 10
    epochs = [[order[epoch * 10 + i] for i in range(10)] for epoch in range(3)]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == [(number, window) for window in range(10)]
    windows = [[window for _, window in epoch] for epoch in epochs]
    assert windows[0] != windows[1] != windows[2]


def test_order_is_a_function_of_seed_and_sample_alone():
    forward = SampleOrder(1000, 7, seed=5)
    seen = [forward[i] for i in range(600)]
    jumping = SampleOrder(1000, 7, seed=5)
    assert [jumping[i] for i in reversed(range(600))] == seen[::-1]
    assert [SampleOrder(1000, 7, seed=5)[i] for i in (599, 0, 300)] == [seen[i] for i in (599, 0, 300)]
    assert [SampleOrder(1000, 7, seed=6)[i] for i in range(600)] != seen


def test_order_does_not_change_between_releases():
    order = SampleOrder(101, 10, seed=1234)
    assert [order[i][1] for i in range(10)] == [4, 1, 6, 8, 5, 3, 7, 2, 9, 0]


def test_without_shuffle_windows_come_in_turn():
    order = SampleOrder(21, 10, seed=0, shuffle=False)
    assert [order[i] for i in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]


@pytest.mark.parametrize(("num_tokens", "samples"), [(11, 1), (20, 1), (21, 2)])
def test_the_last_label_is_one_token_further(num_tokens: int, samples: int):
    assert SampleOrder(num_tokens, 10, seed=0).num_samples == samples


def test_at_most_two_permutations_are_kept():
    order = SampleOrder(101, 10, seed=0)
    for epoch in (0, 1, 2, 1, 7):
        order[epoch * 10]
        assert len(order._permutations) <= 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((10, 10, 0), "has 10 tokens, but one sample of seq_len=10 needs 11"),
        ((10, 0, 0), "seq_len=0"),
        ((10, 2, -1), "seed=-1"),
    ],
)
def test_errors(settings: tuple[int, int, int], message: str):
    with pytest.raises(ValueError, match=message):
        SampleOrder(*settings)


def test_negative_sample():
    with pytest.raises(IndexError):
        SampleOrder(101, 10, 0)[-1]
