"""Stages that exchange several tensors: all arrive, and their gradients are summed."""

from collections.abc import Callable

import pytest
import torch
from stages import HIDDEN, TRAINING, Chunk, Product, tokens, weight
from torch import Tensor

from megalite.parallel.threads import ThreadWorld, run_threads
from megalite.pipeline.executor import Jobs, Spec, Values, execute
from megalite.pipeline.lower import lower
from megalite.pipeline.schedule import make_plan

NUMBERS = Spec((3,), torch.int64, torch.device("cpu"), gradient=False)
SCALES = Spec((2, 1), torch.float64, torch.device("cpu"), gradient=False)


class Coder(Chunk):
    """A stage of an encoder and a decoder: every decoder stage also hands the encoder's output on.

    Beside them travel integers and scales, of which no gradient travels.
    """

    def __init__(self, stage: int, stages: int, encoders: int) -> None:
        super().__init__(stage, stages, True)
        self.encoders = encoders
        shapes = [self.specs(s) for s in (stage, stage + 1)]
        self.arriving, self.leaving = shapes[0] if stage > 0 else (), () if self.last else shapes[1]

    def specs(self, stage: int) -> tuple[Spec, ...]:
        """What goes into a stage: a decoder after the first takes its own input beside the encoder's output."""
        return (HIDDEN, NUMBERS, SCALES, *[HIDDEN] * (stage > self.encoders))

    def forward(self, m: int, arrived: Values, deferred: Jobs | None) -> Values | dict[str, Tensor]:
        if not arrived:
            arrived = (tokens(m), torch.arange(3) + m, torch.full((2, 1), 1.0 + m, dtype=torch.float64))
        encoded, numbers, scales, *decoded = arrived
        assert numbers.tolist() == [m, m + 1, m + 2]
        assert not numbers.requires_grad
        assert not scales.requires_grad
        out = coder(self.stage, self.encoders, Product.apply, self.weight, encoded, scales, decoded, m, deferred)
        if self.last:
            return {"loss": out[-1].sum()}
        return out[0], numbers, scales, *out[1:]


def coder(
    stage: int,
    encoders: int,
    product: Callable[..., Tensor],
    weight: Tensor,
    encoded: Tensor,
    scales: Tensor,
    decoded: list[Tensor],
    m: int,
    *deferred: Jobs | None,
) -> tuple[Tensor, ...]:
    if stage < encoders:
        return ((product(encoded, weight, *deferred).sin() + encoded) * scales,)
    x = decoded[0] if decoded else tokens(50 + m)
    return encoded, product(x * encoded, weight, *deferred).sin() + x


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize(("schedule", "v"), TRAINING)
def test_tuples_pass_through_stages_and_gradients_are_summed(schedule: str, v: int, p: int) -> None:
    stages, m = p * v, 2 * p
    for encoders in range(stages + 1):
        weights = [weight(stage).requires_grad_() for stage in range(stages)]
        for number in range(m):
            scales, x, decoded = torch.full((2, 1), 1.0 + number, dtype=torch.float64), tokens(number), []
            for stage, w in enumerate(weights):
                x, *decoded = coder(stage, encoders, torch.matmul, w, x, scales, decoded, number)
            (decoded or [x])[-1].sum().backward()

        def main(world: ThreadWorld, encoders: int = encoders) -> dict[int, Chunk]:
            chunks = {s: Coder(s, stages, encoders) for s in range(world.rank, stages, p)}
            plan = lower(make_plan(schedule, p, m, v))
            execute(plan[world.rank], chunks, link=world, ranks=range(p), training=True)
            return chunks

        for chunks in run_threads(p, main, timeout_s=20):
            for stage, chunk in chunks.items():
                assert (chunk.weight.grad - weights[stage].grad).abs().max() < 1e-12 * weights[stage].grad.abs().max()


def test_a_value_that_a_stage_does_not_use_has_a_gradient_of_zeros() -> None:
    class Deaf(Chunk):
        def forward(self, m: int, arrived: Values, deferred: Jobs | None) -> Values | dict[str, Tensor]:
            if self.last:
                return {"loss": self.weight.sum()}
            return super().forward(m, arrived, deferred)

    def main(world: ThreadWorld) -> Tensor | None:
        chunk = Deaf(world.rank, 2, True)
        plan = lower(make_plan("1f1b", 2, 2))
        execute(plan[world.rank], {world.rank: chunk}, link=world, ranks=range(2), training=True, loss_scale=3.0)
        return chunk.weight.grad

    first, last = run_threads(2, main, timeout_s=20)
    assert torch.equal(first, torch.zeros(3, 3, dtype=torch.float64))
    assert torch.equal(last, torch.full((3, 3), 6.0, dtype=torch.float64))
