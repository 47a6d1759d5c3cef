"""Log-likelihoods and replies of a model at any layout, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megalite.engine.batches import Microbatch
from megalite.engine.heldout import AT_ONCE
from megalite.engine.stage import Stage
from megalite.inference.decode import stream
from megalite.inference.eval_rows import Cloze, Scores
from megalite.inference.reply import Reply, Settings
from megalite.watch.progress import Bar


def _bar(stage: Stage, what: str, total: int) -> Bar:
    return Bar(what, total, shows=stage.mesh.world.rank == 0)


def log_likelihoods(stage: Stage, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
    """log p(continuation | context) in nats of each (context, continuation), token ids; neither may be empty.

    A sequence is a microbatch. Those of like length go together, padded on the right, where no token sees it.
    """
    assert all(context and continuation for context, continuation in sequences)
    order = sorted(range(len(sequences)), key=lambda i: sum(map(len, sequences[i])))
    found = torch.zeros(len(sequences), dtype=torch.float64, device=stage.mesh.device)
    with _bar(stage, "choices", len(order)) as bar:
        for first in range(0, len(order), AT_ONCE):
            chosen = order[first : first + AT_ONCE]
            length = max(sum(map(len, sequences[i])) for i in chosen) - 1
            losses = stage.losses([_microbatch(*sequences[i], length, stage) for i in chosen])
            if losses and stage.mesh.tp.rank == 0:
                found[chosen] = -torch.stack(losses).double()
            bar.advance(len(chosen), f"{bar.done + len(chosen)} of {len(order)}")
    return stage.mesh.world.all_reduce(found).tolist()


def _microbatch(context: Sequence[int], continuation: Sequence[int], length: int, stage: Stage) -> Microbatch:
    ids = [*context, *continuation]
    padding = [0] * (length + 1 - len(ids))
    mask = [0.0] * (len(context) - 1) + [1.0] * len(continuation) + [0.0] * len(padding)
    row = torch.tensor([ids + padding], device=stage.mesh.device)
    positions = torch.arange(length, device=stage.mesh.device).unsqueeze(0)
    return Microbatch(row[:, :-1], row[:, 1:], torch.tensor([mask], device=stage.mesh.device), positions)


def score(
    stage: Stage, rows: Sequence[Cloze], sequences: Sequence[Sequence[tuple[list[int], list[int]]]]
) -> list[Scores]:
    """The scores of each row's choices, given their `cloze_sequences`."""
    values = iter(log_likelihoods(stage, [each for choices in sequences for each in choices]))
    return [
        Scores([next(values) for _ in choices], [len(c) for _, c in choices], [len(c) for c in row.choices])
        for row, choices in zip(rows, sequences, strict=True)
    ]


def answer(stage: Stage, replies: Sequence[Reply], settings: Settings, batch: int) -> None:
    """Let the model finish every reply, `batch` at a time, those of like length together."""
    ordered = sorted(replies, key=lambda reply: len(reply.prompt))
    with _bar(stage, "answers", len(ordered)) as bar:
        for first in range(0, len(ordered), batch):
            together = ordered[first : first + batch]
            for _ in stream(stage, together, settings):
                pass
            bar.advance(len(together), f"{bar.done + len(together)} of {len(ordered)}")
