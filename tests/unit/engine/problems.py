"""Random training problems: a model, a layout, a schedule, data and what is trained, most of which fit together."""

import itertools
import random
import re
from collections import Counter
from typing import Any

import torch

from megalite.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Resolved,
    TrainConfig,
    TuneConfig,
    check,
    resolve,
)
from megalite.config.check import valid_tp
from megalite.config.schedules import SCHEDULES
from megalite.engine.batches import Microbatch

LR = 1e-3
STEPS = 2
MOST_RANKS = 16
Rows = list[Microbatch]


def draw_model(r: random.Random, layers: int) -> dict[str, Any]:
    heads, learned = r.choice((1, 2, 3, 4, 4, 4, 6, 8, 12, 12)), r.random() < 0.4
    model = {
        "vocab_size": r.choice((3, 11, 29, 37)),
        "hidden_size": r.choice((8, 12, 20)),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": r.choice([None, *(k for k in range(1, heads + 1) if heads % k == 0)]),
        "head_dim": r.choice((2, 4, 6, 5 if learned else 8)),
        "ffn_hidden_size": r.choice((12, 24, 20)),
        "norm_eps": r.choice((1e-5, 1e-3)),
        "tie_embeddings": r.random() < 0.4,
        "qkv_bias": r.random() < 0.3,
        "linear_bias": r.random() < 0.4,
        "qk_norm": r.random() < 0.3,
        "norm": r.choice(("rmsnorm", "layernorm")),
        "activation": r.choice(("swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh")),
        "sliding_window": r.choice((None, None, None, None, None, 1, 2, 5, 40)),
        "dropout": r.choice((0.0, 0.0, 0.2)),
        "attention_dropout": r.choice((0.0, 0.0, 0.3)),
    }
    if learned:
        model |= {"position": "learned", "family": r.choice((None, "gpt2", "llama"))}
        return model | ({"max_positions": r.choice((10, 15))} if r.random() < 0.3 else {})
    model |= {"rope_theta": r.choice((50.0, 10000.0)), "rope_fraction": r.choice((1.0, 1.0, 0.67))}
    scaling = r.choice(("none", "none", "linear", "llama3", "yarn"))
    if scaling != "none":
        model |= {"rope_scaling": scaling, "rope_factor": 3.0, "rope_original_max_positions": 32}
    return model


def draw_layout(r: random.Random) -> dict[str, Any]:
    # what needs several stages a rank fits fewer models
    schedule = r.choice([name for name, row in SCHEDULES.items() for _ in range(1 + row.chunked)])
    recompute = r.choice(("none", "selective", "full"))
    return {
        "pp": r.choice((1, 1, 2, 2, 3, 4)),
        "dp": r.randint(1, 2),
        "sp": r.random() < 0.7,
        "schedule": schedule,
        "chunks": r.randint(2, 3) if SCHEDULES[schedule].chunked else 1 + (r.random() < 0.03),
        "zero": r.choice((0, 1)) if r.random() < 0.98 else 2,
        "bucket_mb": r.choice((0.001, 0.02, 25.0)),
        "overlap": r.random() < 0.7,
        "recompute": recompute,
        "recompute_layers": r.choice((0, 1, 2)) if recompute != "none" or r.random() < 0.05 else 0,
    }


def draw_stages(r: random.Random, layers: int, stages: int) -> tuple[int, ...] | None:
    if r.random() > 0.3 or layers < stages:
        return None
    cuts = sorted(r.sample(range(1, layers), stages - 1))
    counts = [b - a for a, b in itertools.pairwise((0, *cuts, layers))]
    counts[0] += r.random() < 0.05
    return tuple(counts)


def draw_tune(r: random.Random, layers: int) -> dict[str, Any]:
    mode = r.choice(("full", "full", "full", "lora", "lora", "bitfit", "ffn_only"))
    first, last = "embed.* layers.0.*", f"layers.{layers - 1}.* loss_head.*"
    patterns = ("", "", "embed.*", first, last, "*norm*", "*.attn.*", "layers.[0-4].*", "*.bias", "*.weight")
    tune = {"mode": mode, "freeze": r.choice(patterns)}
    if mode == "lora":
        targets = ("", "", "q_proj v_proj", "attn.qkv", "mlp.*", "k_proj o_proj up_proj", f"layers.{layers - 1}.*")
        tune |= {"lora_targets": r.choice(targets), "lora_rank": r.randint(1, 4), "lora_alpha": 3.0}
        tune |= {"lora_dropout": r.choice((0.0, 0.3))}
    return tune


def odd(r: random.Random) -> dict[str, Any]:
    """Values of the model that little fits."""
    keys: dict[str, tuple[int | float | None, ...]] = {
        "head_dim": (None, 3),
        "num_kv_heads": (5, 8),
        "max_positions": (7,),
        "rope_fraction": (0.1,),
    }
    key = r.choice(list(keys))
    return {key: r.choice(keys[key])} if r.random() < 0.1 else {}


def draw_config(r: random.Random) -> Config:
    """Mostly what fits together, sometimes not."""
    layout = draw_layout(r)
    stages = layout["pp"] * layout["chunks"]
    layers = r.randint(1, 8) if r.random() < 0.1 else stages + r.randint(0, min(2, max(0, 8 - stages)))
    model = ModelConfig(**(draw_model(r, layers) | odd(r)))
    sizes = [tp for tp in valid_tp(model) if tp <= 4]
    tp = r.choice((sizes[0], *sizes, sizes[-1], sizes[-1])) if r.random() < 0.9 else r.randint(1, 5)
    if tp * layout["pp"] * layout["dp"] > MOST_RANKS:
        layout["dp"] = 1
    microbatches = r.choice((1, 1, 2, 2, 3, 4, 5, 8))
    if SCHEDULES[layout["schedule"]].chunked and r.random() < 0.9:
        microbatches = layout["pp"] * r.randint(1, max(1, 4 // layout["pp"]))
    micro, optimizers = r.randint(1, 2), ("adamw", "adamw", "muon")
    if model.sliding_window == 1:
        # gradients of queries and keys are nothing but rounding, which Muon would scale up to an update's size
        optimizers = ("adamw",)
    kernels = ("auto", "torch", *(() if model.attention_dropout or model.sliding_window else ("fused",)))
    groups = (
        "",
        "",
        "* lr_scale=0.5",
        "*norm* weight_decay=0.2; layers.0.* lr_scale=0 weight_decay=0",
        "*.bias lr_scale=2",
    )
    return Config(
        model=model,
        parallel=ParallelConfig(tp=tp, stages=draw_stages(r, layers, stages), **layout),
        tune=TuneConfig(**draw_tune(r, layers)),
        optim=OptimConfig(
            name=r.choice(optimizers),
            lr=LR,
            min_lr=0.0,
            # where a gradient is hardly more than rounding, less would let rounding decide the step: lr / eps times it
            eps=1e-4,
            weight_decay=r.choice((0.0, 0.1)),
            muon_lr_rule=r.choice(("match_rms_adamw", "original")),
            groups=r.choice(groups),
            clip_grad=r.choice((0.0, 1.0, 1e-2)),
            label_smoothing=r.choice((0.0, 0.1)),
        ),
        train=TrainConfig(
            dtype="fp64",
            seq_len=r.choice((12, 12, 12, 10)),
            micro_batch_size=micro,
            global_batch_size=micro * microbatches * layout["dp"] + (r.random() < 0.02),
            kernels=r.choice(kernels),
        ),
        checkpoint=CheckpointConfig(load="base"),
    )


def draw_fitting(r: random.Random, refusals: Counter[str]) -> Resolved:
    """The first drawn configuration that can run, resolved; those refused before it are counted by kind."""
    while True:
        drawn = draw_config(r)
        p = drawn.parallel
        assert p.tp is not None
        assert p.pp is not None
        assert p.dp is not None
        ranks = p.tp * p.pp * p.dp
        try:
            config = resolve(drawn, ranks)
            check(config, ranks)
        except ConfigError as error:
            message = str(error)
        else:
            return config
        assert "\n" not in message, message
        # the kind: the message without names and numbers
        kind = re.sub(r"['\"].*?['\"]|near to it.*|\S*[=/\\.]\S*|[-\d]\S*", "", message)
        refusals[" ".join(kind.split())[:60]] += 1


def draw_batches(r: random.Random, config: Config) -> list[Rows]:
    """The microbatches of each step, of all replicas: random documents, weights of tokens, samples numbered through."""
    t, isolated = config.train, r.random() < 0.5
    b, s = t.micro_batch_size, t.seq_len
    generator = torch.Generator().manual_seed(r.getrandbits(32))
    found = []
    for m in range(STEPS * t.global_batch_size // b):
        tokens = torch.randint(0, config.model.vocab_size, (b, s + 1), generator=generator)
        weights = torch.rand(b, s, generator=generator, dtype=torch.float64)
        kind = r.choice(("all", "some", "fractions", "fractions", "none"))
        kept = {"all": weights >= 0, "some": weights > 0.4, "fractions": weights > 0.2, "none": weights < 0}[kind]
        mask = kept * (weights if kind == "fractions" else 1.0)
        index = torch.arange(s).expand(b, s)
        starts = torch.zeros(b, s, dtype=torch.long)
        if isolated:
            begins = torch.rand(b, s, generator=generator) < 0.2
            starts = torch.where(begins, index, 0).cummax(1).values
        bounds = torch.stack([starts, index + 1], -1) if isolated else None
        numbers = torch.arange(m * b, (m + 1) * b)
        found.append(Microbatch(tokens[:, :-1], tokens[:, 1:], mask, index - starts, bounds, numbers))
    size = len(found) // STEPS
    return [found[step * size :][:size] for step in range(STEPS)]
