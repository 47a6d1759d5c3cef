"""Models of transformers laid out as Megatron-LM's legacy models come in with transformers' logits.

The layout is written here from megatron/legacy/model/{language_model,transformer}.py and tools/checkpoint, by hand.
"""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.exchange.hf_verify import load_decoder
from megalite.exchange.megatron import from_megatron
from megalite.model.context import Context

transformers = pytest.importorskip("transformers")
TOKENS = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 5, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
COMMON = {"num_layers": 5, "hidden_size": 32, "num_attention_heads": 4, "kv_channels": 8, "vocab_size": 61,
          "padded_vocab_size": 64, "max_position_embeddings": 64, "seq_length": 48}  # fmt: skip
LLAMA_ARGS = COMMON | {
    "group_query_attention": True, "num_query_groups": 2, "ffn_hidden_size": 40, "norm_epsilon": 1e-6, "swiglu": True,
    "position_embedding_type": "rope", "normalization": "RMSNorm", "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True, "bias_gelu_fusion": False,
}  # fmt: skip
GPT2_ARGS = COMMON | {
    "group_query_attention": False, "num_query_groups": 1, "ffn_hidden_size": 128, "norm_epsilon": 1e-5,
    "swiglu": False, "position_embedding_type": "learned_absolute", "normalization": "LayerNorm",
    "untie_embeddings_and_output_weights": False,
}  # fmt: skip


def randomised(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            middle = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(middle + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def by_group(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """[queries, key, value] of each kv group, as query_key_value has its rows."""
    parts = [part.view(groups, -1, *part.shape[1:]) for part in (q, k, v)]
    return torch.cat(parts, 1).flatten(0, 1)


def padded(weight: Tensor, tp: int, rank: int) -> Tensor:
    return torch.cat([weight, torch.zeros(3, weight.shape[1])]).chunk(tp)[rank].clone()


def llama_layer(layer: Any, tp: int, t: int) -> dict[str, Tensor]:
    a, m = layer.self_attn, layer.mlp
    qkv = by_group(a.q_proj.weight, a.k_proj.weight, a.v_proj.weight, groups=2)
    return {
        "input_norm.weight": layer.input_layernorm.weight,
        "self_attention.query_key_value.weight": qkv.chunk(tp)[t],
        "self_attention.dense.weight": a.o_proj.weight.chunk(tp, 1)[t],
        "post_attention_norm.weight": layer.post_attention_layernorm.weight,
        "mlp.dense_h_to_4h.weight": torch.cat([m.gate_proj.weight.chunk(tp)[t], m.up_proj.weight.chunk(tp)[t]]),
        "mlp.dense_4h_to_h.weight": m.down_proj.weight.chunk(tp, 1)[t],
    }


def gpt2_layer(layer: Any, tp: int, t: int) -> dict[str, Tensor]:
    found = {}
    for there, conv, cut in (
        ("self_attention.query_key_value", layer.attn.c_attn, 0),
        ("self_attention.dense", layer.attn.c_proj, 1),
        ("mlp.dense_h_to_4h", layer.mlp.c_fc, 0),
        ("mlp.dense_4h_to_h", layer.mlp.c_proj, 1),
    ):
        weight, bias = conv.weight.t(), conv.bias
        if there.endswith("query_key_value"):
            weight, bias = by_group(*weight.chunk(3), groups=4), by_group(*bias.chunk(3), groups=4)
        found[f"{there}.weight"] = weight.chunk(tp, cut)[t]
        found[f"{there}.bias"] = bias.chunk(tp)[t] if cut == 0 else bias
    for there, norm in (("input_norm", layer.ln_1), ("post_attention_norm", layer.ln_2)):
        found |= {f"{there}.weight": norm.weight, f"{there}.bias": norm.bias}
    return found


def write(folder: Path, model: Any, args: dict[str, Any], tp: int, stages: list[list[int]]) -> Path:
    """`stages`: of each pipeline rank the layers of its virtual stages, in order; their ends have the embeddings."""
    pp, llama = len(stages), hasattr(model, "model")
    layers = model.model.layers if llama else model.transformer.h
    for p in range(pp):
        for t in range(tp):
            parts = []
            for v, count in enumerate(stages[p]):
                first = sum(stages[q][w] for w in range(v) for q in range(pp)) + sum(stages[q][v] for q in range(p))
                encoder = {}
                for i in range(count):
                    of = (llama_layer if llama else gpt2_layer)(layers[first + i], tp, t)
                    encoder |= {f"layers.{i}.{key}": value.detach().clone() for key, value in of.items()}
                part: dict[str, Any] = {"encoder": encoder}
                if p == 0 and v == 0:
                    embed = model.get_input_embeddings().weight
                    part["embedding"] = {"word_embeddings": {"weight": padded(embed.detach(), tp, t)}}
                    if not llama:
                        part["embedding"]["position_embeddings"] = {"weight": model.transformer.wpe.weight.detach()}
                if p == pp - 1 and v == len(stages[p]) - 1:
                    norm = model.model.norm if llama else model.transformer.ln_f
                    encoder |= {f"final_norm.{key}": value.detach().clone() for key, value in norm.named_parameters()}
                    if llama:
                        part["output_layer"] = {"weight": padded(model.lm_head.weight.detach(), tp, t)}
                parts.append({"language_model": part})
            rank = folder / "iter_0000005" / (f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else ""))
            rank.mkdir(parents=True)
            settings = args | {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
            content = {"args": argparse.Namespace(**settings), "iteration": 5, "checkpoint_version": 3.0}
            models = {"model": parts[0]} if len(parts) == 1 else {f"model{v}": part for v, part in enumerate(parts)}
            torch.save(content | models, rank / "model_optim_rng.pt")
    return folder / "iter_0000005"


def require_equal(folder: Path, model: Any, run: Path) -> None:
    with torch.no_grad():
        theirs = model(TOKENS, use_cache=False).logits
        decoder = load_decoder(from_megatron(folder, run, allow_pickle=True))
        ours = decoder(TOKENS, Context(torch.arange(TOKENS.shape[1]).expand(len(TOKENS), -1)))
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5


STAGES = [
    [[5]],
    [[2], [3]],  # as an uneven split has them, --decoder-first-pipeline-num-layers
    [[0], [5]],  # a stage of the embedding alone
    [[1], [3], [1]],
    [[1, 1], [2, 1]],  # two virtual stages on each of two ranks
    [[1, 0], [1, 1], [1, 1]],
]


# what megatron/training/arguments.py of 2025 sets that is not off
DEFAULTS: dict[str, Any] = {
    "cuda_graph_warmup_steps": 3, "cuda_graph_impl": "none", "cuda_graph_scope": "full", "inference_max_batch_size": 8,
    "inference_max_seq_length": 2560, "inference_dynamic_batching_buffer_size_gb": 40.0, "mlp_chunks_for_prefill": 1,
    "retro_encoder_layers": 2, "retro_encoder_hidden_dropout": 0.1, "retro_num_neighbors": 2, "retro_attention_gate": 1,
    "retro_verify_neighbor_count": True, "softmax_type": "vanilla", "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128, "rotary_base": 10000, "rotary_percent": 1.0, "rope_scaling_factor": 8.0,
    "add_position_embedding": True, "make_vocab_size_divisible_by": 128, "bert_binary_head": True,
    "mtp_loss_scaling_factor": 0.1, "straggler_ctrlr_port": 65535, "straggler_minmax_count": 1,
    "attention_dropout": 0.1, "inprocess_monitor_thread_interval": 1.0, "inprocess_granularity": "node",
    "enable_one_logger": True, "one_logger_project": "megatron-lm", "app_tag_run_version": "0.0.0",
    "timing_log_option": "minmax", "barrier_with_L1_time": True, "tensorboard_log_interval": 1,
    "tensorboard_queue_size": 1000, "hidden_dropout": 0.1, "log_loss_scale_to_tensorboard": True, "weight_decay": 0.01,
    "clip_grad": 1.0, "weight_decay_incr_style": "constant", "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8,
    "sgd_momentum": 0.9, "muon_momentum": 0.9, "muon_split_qkv": True, "muon_scale_mode": "spectral",
    "muon_num_ns_steps": 5, "rl_prompts_per_eval": 32, "grpo_prompts_per_step": 32, "grpo_kl_beta": 0.001,
    "langrl_inference_server_type": "inplace_megatron", "rl_sequence_packing_bin_size": 8192,
    "rl_sequence_packing_algo": "fifo", "micro_batch_size": 1, "global_batch_size": 8,
    "check_for_nan_in_loss_and_grad": True, "clone_scatter_output_in_embedding": True, "profile_step_start": 10,
    "profile_step_end": 12, "profile_ranks": [0], "enable_gloo_process_groups": True,
    "memory_snapshot_path": "snapshot.pickle", "tp_comm_overlap_ag": True, "tp_comm_bootstrap_backend": "nccl",
    "log_interval": 100, "masked_softmax_fusion": True, "bias_swiglu_fusion": True, "bias_dropout_fusion": True,
    "apply_rope_fusion": True, "cross_entropy_fusion_impl": "native", "optimizer": "adam", "train_iters": 100,
    "optimizer_offload_fraction": 1.0, "pin_cpu_grads": True, "pin_cpu_params": True, "dataloader_type": "single",
    "async_tensor_model_parallel_allreduce": True, "gradient_accumulation_fusion": True, "use_legacy_models": True,
    "manual_gc_eval": True, "error_injection_type": "transient_error", "rerun_mode": "validate_results", "seed": 1234,
    "init_method_std": 0.02, "lr_decay_style": "linear", "lr_wsd_decay_style": "exponential", "lr": 1e-4, "min_lr": 0.0,
    "non_persistent_local_ckpt_algo": "fully_parallel", "use_tokenizer_model_from_checkpoint_args": True,
    "ckpt_format": "torch", "ckpt_fully_parallel_save": True, "dist_ckpt_strictness": "assume_ok_unexpected",
    "perform_initialization": True, "strict_fsdp_dtensor_load": True, "initial_loss_scale": 2**32,
    "min_loss_scale": 1.0, "loss_scale_window": 1000, "hysteresis": 2, "overlap_p2p_comm": True,
    "distributed_backend": "nccl", "distributed_timeout_minutes": 10, "align_grad_reduce": True,
    "align_param_gather": True, "local_rank": 0, "scatter_gather_tensors_in_pipeline": True,
    "data_parallel_sharding_strategy": "no_shard", "num_workers": 2, "gradient_reduce_div_fusion": True,
    "num_distributed_optimizer_instances": 1, "context_parallel_size": 1, "torch_fsdp2_reshard_after_forward": True,
    "cp_comm_type": ["p2p"], "replication_factor": 2, "eval_iters": 100, "eval_interval": 1000,
    "tokenizer_type": "HuggingFaceTokenizer", "tiktoken_num_special_tokens": 1000, "mmap_bin_files": True,
    "retriever_seq_length": 256, "sample_rate": 1.0, "mask_prob": 0.15, "short_seq_prob": 0.1,
    "create_attention_mask_in_dataloader": True, "num_dataset_builder_threads": 1, "mid_level_dataset_surplus": 0.005,
    "adlr_autoresume_interval": 1000, "query_in_block_prob": 0.1, "indexer_batch_size": 128, "num_classes": 1000,
    "img_h": 224, "img_w": 224, "num_channels": 3, "patch_dim": 16, "classes_fraction": 1.0, "data_sharding": True,
    "data_per_class_fraction": 1.0, "head_lr_mult": 1.0, "vision_pretraining_type": "classify", "mask_type": "random",
    "vision_backbone_type": "vit", "swin_backbone_type": "tiny", "mask_factor": 1.0, "iter_per_epoch": 1250,
    "dino_local_img_size": 96, "dino_freeze_last_layer": 1, "expert_model_parallel_size": 1, "moe_layer_freq": 1,
    "moe_router_load_balancing_type": "aux_loss", "moe_router_topk": 2, "moe_token_dispatcher_type": "allgather",
    "moe_deepep_num_sms": 20, "moe_upcycling_granularity": 1, "kv_lora_rank": 32, "qk_head_dim": 128, "mscale": 1.0,
    "qk_pos_emb_head_dim": 64, "v_head_dim": 128, "rotary_scaling_factor": 1.0, "mamba_state_dim": 128, "rank": 0,
    "mamba_head_dim": 64, "mamba_num_groups": 8, "main_grads_dtype": "fp32", "main_params_dtype": "fp32",
    "exp_avg_dtype": "fp32", "exp_avg_sq_dtype": "fp32", "enable_msc": True, "world_size": 8, "data_parallel_size": 4,
    "sft_tokenizer_prompt_format": "nemotron-h-aligned", "transformer_pipeline_model_parallel_size": 2,
    "transformer_impl": "local", "fp8_amax_history_len": 1, "fp8_amax_compute_algo": "most_recent", "fp8_wgrad": True,
    "num_layers_at_start_in_bf16": 1, "inference_batch_times_seqlen_threshold": -1, "max_tokens_to_oom": 12000,
    "bert_embedder_type": "megatron", "encoder_num_layers": 5, "encoder_seq_length": 48, "start_weight_decay": 0.01,
    "end_weight_decay": 0.01, "consumed_train_samples": 80, "consumed_valid_samples": 8, "iteration": 5,
}  # fmt: skip


def test_the_options_of_a_whole_run(tmp_path: Path) -> None:
    model = randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)))
    require_equal(write(tmp_path, model, DEFAULTS | LLAMA_ARGS, 2, [[2], [3]]), model, tmp_path / "run")


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("stages", STAGES)
def test_a_llama_at_every_split(tp: int, stages: list[list[int]], tmp_path: Path) -> None:
    model = randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)))
    require_equal(write(tmp_path, model, LLAMA_ARGS, tp, stages), model, tmp_path / "run")


def test_interpolated_positions_are_honoured(tmp_path: Path) -> None:
    scaled = transformers.LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    )
    model = randomised(transformers.LlamaForCausalLM(scaled))
    args = LLAMA_ARGS | {"rotary_seq_len_interpolation_factor": 4}
    require_equal(write(tmp_path, model, args, 2, [[2], [3]]), model, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "activation"),
    [
        ({"bias_gelu_fusion": True}, "gelu_new"),
        ({"bias_gelu_fusion": False}, "gelu"),
        ({"openai_gelu": True, "bias_gelu_fusion": False}, "gelu_new"),
    ],
)
@pytest.mark.parametrize("tp", [1, 2])
def test_a_gpt2_with_the_gelu_it_was_trained_with(
    tp: int, changes: dict[str, Any], activation: str, tmp_path: Path
) -> None:
    sizes = {"vocab_size": 61, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 64}
    model = randomised(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, activation_function=activation)))
    require_equal(write(tmp_path, model, GPT2_ARGS | changes, tp, [[3], [2]]), model, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("args"), "has no args"),
        (lambda c: c.pop("model"), "has no model.language_model"),
        (lambda c: c.update(model={"decoder.layers.0.mlp": torch.zeros(2)}), "has no model.language_model"),
        (lambda c: c.update(checkpoint_version=1.0), "checkpoint_version=1.0 is not supported"),
        (lambda c: c.update(iteration=6), "is of another run or iteration than mp_rank_00"),
        (lambda c: setattr(c["args"], "norm_epsilon", 1e-3), "is of another run or iteration than mp_rank_00"),
        (lambda c: c["model"]["language_model"]["encoder"].pop("layers.0.input_norm.weight"), "different tensors"),
        (lambda c: c["model"]["language_model"]["encoder"]["layers.0.input_norm.weight"].add_(1), "differs between tp"),
        (
            lambda c: c["model"]["language_model"]["encoder"].update({"x.weight": 3}),
            "encoder.x.weight is not a dense tensor",
        ),
        (
            lambda c: c["model"]["language_model"]["encoder"].update({"layers.0.mlp.router.weight": torch.zeros(2)}),
            "different tensors",
        ),
    ],
)
def test_a_rank_that_does_not_belong(change: Any, message: str, tmp_path: Path) -> None:
    model = randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)))
    folder = write(tmp_path, model, LLAMA_ARGS, 2, [[5]])
    file = folder / "mp_rank_01" / "model_optim_rng.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)
    with pytest.raises(ValueError, match=message):
        from_megatron(folder, tmp_path / "run", allow_pickle=True)
    assert not (tmp_path / "run").exists()
