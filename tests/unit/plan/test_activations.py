"""Bytes of activations: by hand for each part, and against what autograd keeps of a real block."""

import dataclasses
from typing import Any

import torch
from models import tiny

from megalite.config import Config, ModelConfig, ParallelConfig, TrainConfig, resolve
from megalite.model.context import Context
from megalite.parallel.groups import SoloWorld
from megalite.plan.activations import activation_bytes, deferred_bytes, recompute_bytes, stage_activation_bytes
from megalite.plan.costs import memory

WIDE = tiny(vocab_size=65, hidden_size=64, num_layers=6, num_heads=4, num_kv_heads=4, head_dim=16, ffn_hidden_size=176)
LAYERS = WIDE.num_layers


def make(model: ModelConfig = WIDE, ranks: int = 1, train: dict[str, Any] | None = None, **parallel: Any) -> Config:
    config = Config(model=model, parallel=ParallelConfig(**parallel), train=TrainConfig(**(train or {})))
    return resolve(config, ranks)


def config_of(tp: int = 1, recompute: str = "none", layers: int = 0, model: ModelConfig = WIDE, **train: Any) -> Any:
    sizes = {"seq_len": 128, "micro_batch_size": 2, "global_batch_size": 2, "dtype": "bf16"} | train
    return make(model, tp, sizes, tp=tp, recompute=recompute, recompute_layers=layers)


def test_a_recomputed_block_keeps_its_input_alone() -> None:
    assert activation_bytes(config_of(), "full") == 2 * 128 * 64 * 2
    assert activation_bytes(config_of(2), "full") == 128 * 64 * 2  # sequence parallelism halves it
    assert activation_bytes(config_of(), "full") < activation_bytes(config_of(kernels="torch"), "selective")
    assert activation_bytes(config_of(), "selective") < activation_bytes(config_of(kernels="torch"))


def test_scores_are_kept_where_the_kernel_keeps_them() -> None:
    """[b, heads, s, s] once for the fused kernel, twice for the reference; dropout keeps them with a mask of bytes."""
    plain, scores = activation_bytes(config_of(kernels="auto")), 2 * 4 * 128 * 128 * 2
    assert activation_bytes(config_of(kernels="fused")) == plain + scores
    assert activation_bytes(config_of(kernels="torch")) == plain + 2 * scores
    dropping = dataclasses.replace(WIDE, attention_dropout=0.1)
    assert activation_bytes(config_of(model=dropping, kernels="auto")) == plain + 2 * scores + scores // 2


def test_a_stage_keeps_less_of_the_blocks_that_recompute() -> None:
    config = config_of(recompute="full", layers=4)
    whole, part = activation_bytes(config), activation_bytes(config, "full")
    assert stage_activation_bytes(config, LAYERS) == 4 * part + 2 * whole
    assert stage_activation_bytes(config, 3) == 3 * part
    assert stage_activation_bytes(config_of(recompute="full"), LAYERS) == LAYERS * part
    assert stage_activation_bytes(config_of(), LAYERS) == LAYERS * whole
    assert recompute_bytes(config) == whole
    assert recompute_bytes(config_of()) == 0


def test_deferred_weight_gradients_keep_inputs_and_output_gradients() -> None:
    """Per token of a block: inputs h, heads, h, ffn; output gradients of qkv, h, 2 ffn, h."""
    inputs, gradients = 64 + 64 + 64 + 176, 3 * 64 + 64 + 2 * 176 + 64
    tokens = 2 * 128
    assert deferred_bytes(config_of(), 3, last=False) == tokens * 2 * 3 * (inputs + gradients)
    head = 64 + 65  # its input, and gradients of logits
    assert deferred_bytes(config_of(), 0, last=True) == tokens * 2 * head
    assert deferred_bytes(config_of(2), 0, last=True) == tokens * 2 * (32 + 33)  # 65 rows padded


def test_activations_are_about_what_autograd_keeps() -> None:
    """Within a quarter of the bytes that a block's saved tensors hold."""
    from megalite.engine.batches import Microbatch
    from megalite.engine.engine import build

    model = ModelConfig(vocab_size=64, hidden_size=64, num_layers=6, num_heads=4, num_kv_heads=4, ffn_hidden_size=176)
    config = make(model, train={"seq_len": 128, "micro_batch_size": 2, "global_batch_size": 2, "kernels": "auto"})
    engine = build(config, SoloWorld())
    saved: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in engine.models[0].parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    tokens = torch.zeros(2, 128, dtype=torch.long)
    mb = Microbatch(tokens, tokens, torch.ones(2, 128), torch.arange(128).expand(2, 128))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = engine.models[0](mb.tokens, Context(mb.positions), mb.labels, mb.loss_mask)["loss"]
    kept = sum(saved.values())
    loss.backward()
    planned = memory(config, "cpu")
    assert 0.75 < (planned.activations + planned.logits) / kept < 1.5
