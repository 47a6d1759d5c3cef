"""The ramp of the global batch: a pure function of consumed samples, so a resumed run takes the same steps."""

import random
import time

from megalite.config import Config, ParallelConfig, Resolved, TrainConfig, resolve
from megalite.config.batch import batch_size, steps_for, total_samples


def config(steps: int = 12, dp: int = 1, **train: int) -> Resolved:
    base = {"micro_batch_size": 2, "global_batch_size": 16}
    return resolve(Config(train=TrainConfig(steps=steps, **(base | train)), parallel=ParallelConfig(dp=dp)), dp)


def total(c: Resolved) -> int:
    return total_samples(c.train, c.parallel.dp)


def sizes(c: Resolved, samples: int = 0, steps: int | None = None) -> list[int]:
    found = []
    for _ in range(c.train.steps if steps is None else steps):
        found.append(batch_size(c.train, c.parallel.dp, samples))
        samples += found[-1]
    return found


def test_without_a_ramp_all_steps_are_alike() -> None:
    assert sizes(config()) == [16] * 12
    assert total(config()) == config().optim.decay_samples == 192


def test_golden() -> None:
    c = config(ramp_start=4, ramp_samples=48)
    assert sizes(c) == [4, 4, 6, 6, 8, 10, 12, 16, 16, 16, 16, 16]
    assert total(c) == c.optim.decay_samples == sum(sizes(c))


def test_steps_are_multiples_of_what_the_replicas_take() -> None:
    found = sizes(config(dp=2, ramp_start=4, ramp_samples=48))
    assert found == sorted(found)
    assert all(size % 4 == 0 for size in found)


def test_a_resumed_run_takes_the_same_steps() -> None:
    c = config(ramp_start=2, ramp_samples=70)
    whole = sizes(c)
    for done in range(12):
        assert sizes(c, sum(whole[:done]), 12 - done) == whole[done:]


def test_a_run_may_end_within_its_ramp() -> None:
    c = config(steps=3, ramp_start=4, ramp_samples=48)
    assert total(c) == sum(sizes(c)) == 14


def test_the_fewest_steps_for_so_many_samples() -> None:
    for ramp in ({}, {"ramp_start": 4, "ramp_samples": 48}):
        for samples in (1, 15, 16, 17, 47, 48, 49, 100.5, 1000):
            steps = steps_for(config(**ramp).train, 1, samples)
            assert total(config(steps=steps, **ramp)) >= samples
            assert steps == 1 or total(config(steps=steps - 1, **ramp)) < samples


def test_whole_plateaus_are_counted_as_their_steps_would_be() -> None:
    drawn = random.Random(0)
    for _ in range(300):
        unit = drawn.choice((1, 2, 3))
        whole = unit * drawn.randint(1, 20)
        ramp = {"ramp_start": unit * drawn.randint(1, whole // unit), "ramp_samples": drawn.randint(1, 400)}
        steps = drawn.randint(1, 90)
        c = config(steps=steps, micro_batch_size=unit, global_batch_size=whole, **ramp)
        assert total(c) == sum(sizes(c))
        samples = drawn.choice((drawn.randint(1, 900), drawn.random() * 900))
        assert steps_for(c.train, 1, samples) == next(n for n in range(1, 10000) if sum(sizes(c, steps=n)) >= samples)


def test_the_longest_ramp_is_counted_at_once() -> None:
    began = time.process_time()
    c = config(steps=10**9, micro_batch_size=1, global_batch_size=10**5, ramp_start=1, ramp_samples=10**9, seq_len=1)
    assert 10**13 < c.optim.decay_samples < 10**14
    assert steps_for(c.train, 1, 10**12) > 10**7
    assert time.process_time() - began < 5
