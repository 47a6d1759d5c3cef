"""ZeRO: the bytes that a replica keeps of a parameter, and that shares are gathered before they are used."""

from typing import Any

import pytest
import torch
from nets import model
from torch import Tensor

from megalite.config import Config, ModelConfig, ParallelConfig, TrainConfig, resolve
from megalite.engine.engine import Engine, build
from megalite.parallel.grad_buffers import GradBuffers
from megalite.parallel.param_buffers import ParamBuffers
from megalite.parallel.threads import run_threads


def kept_bytes(engine: Engine) -> dict[str, int]:
    """Bytes of storage by kind; views of one storage count once."""

    def of(*tensors: Tensor) -> int:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    state = engine.state()
    weights = of(*state.pop("weight").values())
    return {
        "weights": weights,
        "gradients": of(engine.grads.flat),
        "optimizer": sum(of(*tensors.values()) for tensors in state.values()),
    }


@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_parameter_takes_6_bytes_and_12_divided_by_the_replicas(dp: int, dtype: str) -> None:
    model = ModelConfig(hidden_size=128, num_layers=2)
    config = resolve(
        Config(model, ParallelConfig(tp=1, pp=1, dp=dp, zero=1, bucket_mb=0.5), train=TrainConfig(dtype=dtype)), dp
    )
    engines = run_threads(dp, lambda world: build(config, world))
    number = sum(p.numel() for p in engines[0].parameters.values())
    kept = [kept_bytes(engine) for engine in engines]
    for each in kept:
        # a little more than 2 and 4: parameters and shares are aligned
        assert each["weights"] == pytest.approx(2 * number, rel=0.01)
        assert each["gradients"] == pytest.approx(4 * number, rel=0.01)
        assert each["optimizer"] == pytest.approx(12 * number / dp, rel=0.01)
    assert sum(each["optimizer"] for each in kept) == 12 * number


def test_wide_shares_are_their_own_masters() -> None:
    config = resolve(Config(parallel=ParallelConfig(tp=1, pp=1, dp=2, zero=1), train=TrainConfig()), 2)
    for engine in run_threads(2, lambda world: build(config, world)):
        assert engine.state().keys() == {"weight", "exp_avg", "exp_avg_sq"}
        storages = {p.untyped_storage().data_ptr() for p in engine.parameters.values()}
        assert all(m.untyped_storage().data_ptr() in storages for m in engine.optimizer.masters.values())


def test_parameters_are_gathered_before_they_are_used() -> None:
    """Each rank writes its number into its share; whichever module runs first sees all of them."""

    def main(world: Any) -> list[Tensor]:
        net = model()
        parameters = dict(net.named_parameters())
        before = {name: p.detach().clone() for name, p in parameters.items()}
        grads = GradBuffers(parameters, world.split([[0, 1, 2]]), 12 * 4, True, True)
        buffers = ParamBuffers(parameters, grads, net)
        assert all(torch.equal(p, before[name]) for name, p in parameters.items())
        for share in buffers.shares.values():
            share.fill_(world.rank)
        buffers.gather()
        net[2](torch.zeros(1, 4))
        for name in ("2.weight", "2.bias"):
            assert torch.equal(parameters[name], parameters[name].round())
        buffers.finish()
        return [p.detach() for p in parameters.values()]

    ranks = run_threads(3, main)
    for tensors in zip(*ranks):
        assert all(torch.equal(t, tensors[0]) for t in tensors)
        assert set(tensors[0].unique().tolist()) <= {0.0, 1.0, 2.0}
