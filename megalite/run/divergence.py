"""Training that goes wrong: where a number first stopped being finite, and a loss far above those before it."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from megalite.config import Config
from megalite.data.dataset import Samples
from megalite.engine.batches import Microbatch
from megalite.engine.engine import Engine
from megalite.parallel.groups import share_text

# a loss of SPIKE times the median of the last WINDOW steps is reported; one batch is seldom twice as hard as another
SPIKE = 4.0
WINDOW = 32
ENOUGH = 8


class Spikes:
    """Compares each loss with the median of the last ones of this process."""

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.high = False

    def ratio(self, loss: float) -> float:
        """`loss` over the median if that is a spike, else 0. `high`: whether the loss before it was a spike too."""
        usual = statistics.median(self.recent) if len(self.recent) >= ENOUGH else 0.0
        self.recent.append(loss)
        return loss / usual if 0 < SPIKE * usual < loss else 0.0

    def begins(self, ratio: float) -> bool:
        """Whether the step of this ratio is the first of a spike, the one to report."""
        first, self.high = ratio > 0 and not self.high, ratio > 0
        return first


def locate(engine: Engine, microbatches: Sequence[Microbatch], dataset: Samples, finite_loss: bool) -> str:
    """Find the first rank and tensor of this step that are not finite, and the samples. Every rank must call it.

    It looks at weights first, since they affect everything else; then at each module's output, for which the forward
    runs again; then at losses and gradients.
    """
    looks: list[Callable[[], str]] = [partial(_weights, engine)]
    if not finite_loss:
        looks += [partial(_outputs, engine, microbatches, dataset), partial(_losses, engine, microbatches, dataset)]
    looks += [partial(_gradients, engine)]
    for look in looks:
        # the first rank of the earliest stage
        if found := share_text(engine.mesh.world, look() or None, engine.mesh.device):
            return found
    return "no rank finds it in its weights, losses or gradients: an overflow in a sum over ranks"


def _here(engine: Engine) -> str:
    mesh = engine.mesh
    where = ", ".join(
        f"{name} {g.rank}" for name, g in (("pp", mesh.pp), ("dp", mesh.dp), ("tp", mesh.tp)) if g.size > 1
    )
    return f"rank {mesh.link.rank}" + (f" ({where})" if where else "")


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def _weights(engine: Engine) -> str:
    name = next((name for name, x in engine.parameters.items() if not _finite(x)), None)
    return "" if name is None else f"the weight {name} on {_here(engine)}"


def _gradients(engine: Engine) -> str:
    gradients = {**engine.grads.main_grad, **engine.grads.reduced}
    name = next((name for name, x in gradients.items() if not _finite(x)), None)
    return "" if name is None else f"the gradient of {name} on {_here(engine)}"


def _losses(engine: Engine, microbatches: Sequence[Microbatch], dataset: Samples) -> str:
    for microbatch, loss in zip(microbatches, engine.microbatch_losses):
        if not _finite(loss):
            return f"the loss on {_here(engine)}, of {_samples(microbatch, dataset)}"
    return ""


def _outputs(engine: Engine, microbatches: Sequence[Microbatch], dataset: Samples) -> str:
    """Run the forward again and check the output of each module, children before their parents."""
    found: list[str] = []
    done = dict.fromkeys(engine.models, 0)

    def look(stage: int, name: str, module: nn.Module, inputs: object, output: object) -> None:
        if not found and isinstance(output, Tensor) and not _finite(output):
            samples = _samples(microbatches[done[stage]], dataset)
            found.append(f"the output of {name or 'the stage'} on {_here(engine)}, of {samples}")
        done[stage] += name == ""

    hooks = [
        module.register_forward_hook(partial(look, stage, name))
        for stage, model in engine.models.items()
        for name, module in model.named_modules()
    ]
    try:
        engine.losses(microbatches)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""


def _samples(microbatch: Microbatch, dataset: Samples) -> str:
    assert microbatch.samples is not None
    numbers = microbatch.samples.tolist()
    return f"samples {numbers[0]} to {numbers[-1]} ({dataset.describe(numbers)})"


def advice(config: Config, samples: range, dataset: Samples) -> str:
    """The batch, and how to skip it: a run that resumes reads the same batch again."""
    passed = ",".join(filter(None, (config.train.skip_samples, f"{samples.start}:{samples.stop}")))
    source = Path(config.data.sft or config.data.path or "").name
    name = f" of {source}" if source else ""
    held = f"samples {samples.start} to {samples.stop - 1}{name} ({dataset.describe(samples)})"
    return f"the batch was {held}, and a resumed run meets it again: train.skip_samples={passed} passes over it"


def spike_warning(
    config: Config, step: int, samples: range, dataset: Samples, loss: float, ratio: float, norm: float
) -> str:
    return (
        f"WARNING: step {step}: loss {loss:.4g} is {ratio:,.3g} times the usual of the last steps, gradient norm "
        f"{norm:.3g}; if it does not come back, stop, resume from an older checkpoint and lower optim.lr; "
        f"{advice(config, samples, dataset)}"
    )
