"""Makes the helper modules of this folder importable, and has the tokens that its tests share."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from decoders import B, S


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 31, (B, S), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def positions() -> Tensor:
    return torch.arange(S).expand(B, S)
