"""What a run can train for: one row a kind. The loop, the engine and checkpoints are the same for all of them.

No torch here: a command reads its row, and the data that the row opens, before torch has loaded.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megalite.config import Config

if typing.TYPE_CHECKING:
    from megalite.data.sets import DataSets


@dataclass(frozen=True)
class Objective:
    """One kind of training.

    applies(config): whether this row trains a configuration that does not name its kind otherwise.
    open_data(config, scan): opens and checks the data of a resolved configuration; what is predicted, and with which
        weight, is in its batches. scan: also read small data through, which one rank should do. Raises ValueError.
    head: what ends the model, a key of HEADS in megalite/model/decoder.py; it names what is summed over a batch.
    figures(sums): what is reported of a batch or a set, by name, of the named sums over it; always has `loss`, which
        decides whether training has diverged and which evaluation was best.
    starts_trained: whether a run normally continues from the weights of another one.
    """

    applies: Callable[[Config], bool]
    open_data: Callable[[Config, bool], DataSets]
    head: str
    figures: Callable[[Mapping[str, float]], dict[str, float]]
    starts_trained: bool


def mean_loss(sums: Mapping[str, float]) -> dict[str, float]:
    """`loss`: nats per trained token, of Σ weight · loss and Σ weight of the tokens."""
    return {"loss": sums["loss"] / sums["tokens"]}


# The two below import late: most mistakes on a command line are reported before the modules of data have loaded.
def open_stream(config: Config, scan: bool) -> DataSets:
    from megalite.data import pretraining

    return pretraining.open_stream(config, scan)


def open_conversations(config: Config, scan: bool) -> DataSets:
    from megalite.data import tuning

    return tuning.open_conversations(config, scan)


PRETRAINING = Objective(
    applies=lambda config: True,
    open_data=open_stream,
    head="next-token",
    figures=mean_loss,
    starts_trained=False,
)
TUNING = Objective(
    applies=lambda config: config.data.sft is not None,
    open_data=open_conversations,
    head="next-token",
    figures=mean_loss,
    starts_trained=True,
)


def described(figures: Mapping[str, float]) -> list[str]:
    """The figures beside the loss, for a line of the log."""
    return [f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items() if name != "loss"]


OBJECTIVES = (TUNING, PRETRAINING)
"""The first that applies trains a configuration."""


def objective_of(config: Config) -> Objective:
    """The row that trains a configuration."""
    return next(row for row in OBJECTIVES if row.applies(config))
