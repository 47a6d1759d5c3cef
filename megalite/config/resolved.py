"""The configuration that a run uses: every key that may be null until it has been chosen has a value.

`Config` is what a user wrote. `resolve` makes a `Resolved` of it: the same keys, in the same order, with the same YAML.
What reads files or shows YAML takes a `Config`; what computes takes a `Resolved`, and needs no check for None.
Two configurations are equal only if they are of the same class: compare their YAML, or `dataclasses.asdict`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megalite.config.batch import total_samples
from megalite.config.keys import Complete, rule_of, values_of
from megalite.config.model import ResolvedModel, resolve_model
from megalite.config.schema import SECTIONS, Config, OptimConfig, ParallelConfig
from megalite.config.trained import NamedShapes, named_shapes
from megalite.config.values import check_values


@dataclass(frozen=True)
class ResolvedParallel(Complete, ParallelConfig):
    tp: int = field(kw_only=True, metadata=rule_of(ParallelConfig, "tp"))
    pp: int = field(kw_only=True, metadata=rule_of(ParallelConfig, "pp"))
    dp: int = field(kw_only=True, metadata=rule_of(ParallelConfig, "dp"))


@dataclass(frozen=True)
class ResolvedOptim(Complete, OptimConfig):
    decay_samples: int = field(kw_only=True, metadata=rule_of(OptimConfig, "decay_samples"))


@dataclass(frozen=True)
class Resolved(Config):
    model: ResolvedModel = field(kw_only=True)
    parallel: ResolvedParallel = field(kw_only=True)
    optim: ResolvedOptim = field(kw_only=True)

    @property
    def shapes(self) -> NamedShapes:
        """Shapes of the parameters by name: of the model, of LoRA's factors, of what is trained. Computed once.

        Raises ConfigError if a pattern of tune matches nothing, or nothing is left to train.
        """
        return named_shapes(self.model, self.tune)


def resolve(config: Config, world_size: int) -> Resolved:
    """Replace every null that follows from other keys and the number of ranks. Call `check` on the result.

    parallel.tp and parallel.pp become 1 unless they have been chosen before (megalite.plan.topology).
    Raises ConfigError if a value is out of its range.
    """
    check_values(config)
    return complete(config, world_size)


def complete(config: Config, world_size: int) -> Resolved:
    """As `resolve`, for a configuration that was in range when it was written: that of a checkpoint."""
    p, optim = config.parallel, config.optim
    tp, pp = p.tp or 1, p.pp or 1
    dp = p.dp if p.dp is not None else max(1, world_size // max(1, tp * pp * p.cp))
    decay = optim.decay_samples
    if decay is None:
        decay = max(total_samples(config.train, dp), optim.warmup_samples)
    sections = values_of(config) | {
        "model": resolve_model(config.model, config.train.seq_len),
        "parallel": ResolvedParallel(**values_of(p) | {"tp": tp, "pp": pp, "dp": dp, "sp": p.sp and tp > 1}),
        "optim": ResolvedOptim(**values_of(optim) | {"decay_samples": decay}),
    }
    return Resolved(**sections)


def reopen(config: Config, *keys: str) -> Config:
    """`config` with `keys`, such as "parallel.dp", null again: `resolve` chooses them anew."""
    sections = {}
    for name, section in SECTIONS.items():
        values = values_of(getattr(config, name))
        sections[name] = section(**values | {key: None for key in values if f"{name}.{key}" in keys})
    return Config(**sections)
