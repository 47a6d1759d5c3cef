"""From samples of a data set to the tensors of one rank's microbatches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megalite.config import Resolved
from megalite.config.errors import TrainingError
from megalite.data.dataset import Batch, Layout, Samples
from megalite.parallel.mesh import Mesh


@dataclass
class Microbatch:
    """Tensors [b, s] of one microbatch; `bounds` [b, s, 2] or None (see AttentionCore).

    `samples` [b]: numbers of the samples, which dropout is keyed by; None where there is none.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor
    bounds: Tensor | None = None
    samples: Tensor | None = None


def load_microbatches(dataset: Samples, samples: range, config: Resolved, mesh: Mesh) -> list[Microbatch]:
    """This replica's share of `samples`: replicas take turns, a microbatch each.

    Every replica gets the same number; what goes beyond `samples` to fill up the last ones is masked. Raises
    TrainingError for a token that the model does not have.
    """
    ends = mesh.is_first_stage or mesh.is_last_stage
    size, dp = config.train.micro_batch_size, mesh.dp
    stop = samples.start + -(-len(samples) // (size * dp.size)) * size * dp.size
    firsts = range(samples.start + dp.rank * size, stop, size * dp.size)
    found = []
    for first in firsts:
        indices = range(first, first + size)
        batch = dataset.batch(indices) if ends else _without_tokens(dataset.layout(indices))
        batch.loss_mask[max(0, samples.stop - first) :] = 0
        _check_tokens(batch, first, config.model.vocab_size)
        *tensors, bounds = (
            None if x is None else torch.from_numpy(x).to(mesh.device, non_blocking=True) for x in batch
        )
        numbers = torch.arange(first, first + size, device=mesh.device)
        found.append(Microbatch(*tensors, bounds=bounds, samples=numbers))  # type: ignore[arg-type, misc]
    return found


def _without_tokens(layout: Layout) -> Batch:
    """What a stage between the ends takes of a batch: it neither embeds tokens nor has a loss, so none are read."""
    nothing = np.zeros_like(layout.positions)
    return Batch(nothing, nothing, nothing.astype(np.float32), *layout)


def _check_tokens(batch: Batch, first: int, vocab_size: int) -> None:
    largest = max(int(batch.tokens.max()), int(batch.labels.max()))
    if largest >= vocab_size:
        raise TrainingError(
            f"sample {first}: token {largest} is not below model.vocab_size={vocab_size}; "
            f"preprocess the text with the model's own tokenizer"
        )
