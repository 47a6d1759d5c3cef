"""Runs of LoRA on small Hugging Face models, and peft's models beside them."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import BATCH, SEQ, batches
from torch import Tensor

from megalite.checkpoint.save import save
from megalite.checkpoint.state import State
from megalite.config import Config, OptimConfig, ParallelConfig, TrainConfig, TuneConfig, check, resolve
from megalite.engine.engine import build
from megalite.exchange.base import name_of
from megalite.exchange.hf_folder import open_config
from megalite.model.init import draw
from megalite.model.layouts import from_hf
from megalite.optim.adamw import clip_scale
from megalite.parallel.groups import World
from megalite.parallel.threads import run_threads

STEPS, LR, RANK, ALPHA = 20, 1e-2, 4, 8.0


peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

COMMON = {"vocab_size": 101, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
LLAMA = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 36,
    "max_position_embeddings": 64,
}


GPT2 = {
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}

FAMILIES = {"Llama": LLAMA, "Qwen2": LLAMA, "GPT2": GPT2}


@functools.cache
def folder(family: str, root: Path) -> Path:
    """A Hugging Face folder with a random model of fp32 weights."""
    torch.manual_seed(0)
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**COMMON, **FAMILIES[family]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in key or ("ln_" in key and "weight" in key) else 0.0, 0.1)
    model.save_pretrained(root / family)
    return root / family


def theirs(source: Path, target: Path | None = None) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="sdpa", dtype=torch.float32)
    return model if target is None else peft.PeftModel.from_pretrained(model, target)


def make_config(source: Path, run_dir: Path, parallel: dict[str, Any], tune: dict[str, Any] | None = None) -> Config:
    p = {"tp": 1, "pp": 1, "dp": 1, "sp": False, "bucket_mb": 0.001} | parallel
    config = Config(
        model=dataclasses.replace(open_config(source)[0], from_hf=str(source)),
        parallel=ParallelConfig(**p),
        train=TrainConfig(seq_len=SEQ, micro_batch_size=BATCH, global_batch_size=4 * BATCH, run_dir=str(run_dir)),
        optim=OptimConfig(lr=LR, weight_decay=0.0, beta2=0.999),
        tune=TuneConfig(**{"mode": "lora", "lora_rank": RANK, "lora_alpha": ALPHA, **(tune or {})}),
    )
    config = resolve(config, p["tp"] * p["pp"] * p["dp"])
    check(config, p["tp"] * p["pp"] * p["dp"])
    return config


def ours(
    config: Config, weights: dict[str, Tensor], save_to: Path | None = None, base: Path | None = None
) -> list[float]:
    """The mean losses of STEPS steps, each on all of `batches`; then a checkpoint."""

    def main(world: World) -> list[tuple[float, float]]:
        def value(name: str, shape: tuple[int, ...]) -> Tensor:
            return (
                draw(name, shape, config.model, 7)
                if ".lora_" in name
                else from_hf(weights.__getitem__, name, config.model)
            )

        engine = build(config, world, value)
        found = []
        dp = engine.mesh.dp
        for _ in range(STEPS):
            loss, tokens = engine.forward_backward(batches(False)[dp.rank :: dp.size]).values()
            sums = torch.tensor([loss, tokens, engine.gradient_squares()], dtype=torch.float64)
            loss, tokens, squares = engine.mesh.world.all_reduce(sums).tolist()
            engine.update(LR, clip_scale(config.optim, squares, tokens)[1])
            found.append(loss / tokens)
        if save_to is not None:
            place = name_of(base or Path(config.model.from_hf))
            state = dataclasses.asdict(State(step=STEPS, consumed_samples=STEPS * BATCH, base=place))
            save(save_to, config, engine.mesh, engine.shards, engine.spans(), engine.state(), state)
        return found

    p = config.parallel
    return run_threads(p.tp * p.pp * p.dp, main)[0]
