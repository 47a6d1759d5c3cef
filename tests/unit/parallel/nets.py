"""A small network and its data, for tests of gradient and parameter buffers."""

import torch
from torch import Tensor, nn

from megalite.parallel.groups import Group

ONE = Group([0], 0)
HUGE, TINY = 2.0**40, 1.0


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    generator = torch.Generator().manual_seed(0)  # threads share the global one
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0.0, 0.5, generator=generator)
    return net.to(dtype)


def data(seed: int) -> Tensor:
    return torch.randn(7, 3, generator=torch.Generator().manual_seed(seed))
