"""The loss of a model over a data set, at any layout and the same on every rank."""

from __future__ import annotations

from megalite.data.dataset import Samples
from megalite.engine.batches import load_microbatches
from megalite.engine.stage import Stage
from megalite.parallel.groups import sum_numbers
from megalite.watch.progress import Bar

# microbatches per pass through the pipeline: enough to fill the pipeline, few enough to hold in memory
AT_ONCE = 32


def held_out(stage: Stage, dataset: Samples, what: str, shows: bool) -> dict[str, float]:
    """The `sums` of the stage over every sample of `dataset`. Collective.

    what: the name of the progress bar. shows: whether this rank draws it. Raises TrainingError for a token that the
    model does not have.
    """
    sums = dict.fromkeys(stage.sums, 0.0)
    chunk = AT_ONCE * stage.config.train.micro_batch_size * stage.mesh.dp.size
    with Bar(what, len(dataset), shows=shows) as bar:
        for first in range(0, len(dataset), chunk):
            samples = range(first, min(first + chunk, len(dataset)))
            found = stage.evaluate(load_microbatches(dataset, samples, stage.config, stage.mesh))
            sums = {name: value + found[name] for name, value in sums.items()}
            bar.advance(len(samples), f"{samples.stop} of {len(dataset)} samples")
    return sum_numbers(stage.mesh.world, sums, stage.mesh.device)
