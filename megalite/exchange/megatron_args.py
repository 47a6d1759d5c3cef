"""The arguments that Megatron-LM stores in a checkpoint, as a `ModelConfig`. No torch here.

Names and defaults are those of megatron/training/arguments.py from 2023 to 2026. Arguments of the legacy model are read
(READ), those that it does not support must be off (NEUTRAL), and those of training, data or other models may have any
value (TRAINING, FAMILIES). An argument of any other name, as in forks, is refused unless it is off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.config import ModelConfig
from megalite.exchange.hf_fields import Fields


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# argument -> the values it may have, besides null; others compute something that is not supported
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("apply_residual_connection_post_layernorm", "apply_layernorm_1p"), (False,)),
    **dict.fromkeys(("layernorm_zero_centered_gamma", "rotary_interleaved", "squared_relu", "onnx_safe"), (False,)),
    **dict.fromkeys(("quick_geglu", "qk_layernorm", "qk_l2_norm", "multi_latent_attention"), (False,)),
    **dict.fromkeys(("use_rope_scaling", "retro_add_retriever", "is_hybrid_model", "attention_output_gate"), (False,)),
    **dict.fromkeys(("parallel_attn", "use_alibi", "biencoder_shared_query_context_model"), (False,)),
    **dict.fromkeys(("num_experts", "num_moe_experts", "mtp_num_layers", "drop_path_rate"), (0,)),
    **dict.fromkeys(
        ("glu_linear_offset", "hybrid_attention_ratio", "hybrid_mlp_ratio", "biencoder_projection_dim"), (0,)
    ),
    **dict.fromkeys(("window_size", "window_attn_skip_freq", "no_rope_freq", "mrope_section", "softmax_scale"), ()),
    **dict.fromkeys(("activation_func_clamp_value", "hybrid_override_pattern", "linear_attention_freq", "spec"), ()),
    **dict.fromkeys(("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"), ()),
    **dict.fromkeys(("experimental_attention_variant", "decoder_num_layers"), ()),
    "softmax_type": ("vanilla",),
}
READ = _words(
    """
    num_layers encoder_num_layers hidden_size num_attention_heads group_query_attention num_query_groups
    kv_channels ffn_hidden_size vocab_size padded_vocab_size norm_epsilon layernorm_epsilon normalization swiglu
    openai_gelu bias_gelu_fusion add_bias_linear add_qkv_bias position_embedding_type
    use_rotary_position_embeddings add_position_embedding rotary_percent rotary_base
    rotary_seq_len_interpolation_factor max_position_embeddings seq_length untie_embeddings_and_output_weights
    tensor_model_parallel_size pipeline_model_parallel_size tokenizer_type
    """
)
TRAINING = _words(
    """
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
    accumulate_allreduce_grads_in_fp32 align_grad_reduce align_param_gather allow_ambiguous_pad_tokens
    app_tag_run_name app_tag_run_version apply_query_key_layer_scaling apply_rope_fusion async_save
    async_strategy async_tensor_model_parallel_allreduce attention_backend attention_dropout
    attention_softmax_in_fp32 auto_detect_ckpt_format autocast_dtype barrier_with_L1_time batch_invariant_mode
    batch_p2p_comm batch_p2p_sync batch_size bert_binary_head bert_embedder_type bert_load beta_fast beta_slow
    bf16 bias_activation_fusion bias_dropout_fusion bias_swiglu_fusion block_data_path cache_mla_latents
    calc_ft_timeouts calculate_per_token_loss check_for_large_grads check_for_nan_in_loss_and_grad
    check_for_spiky_loss check_weight_hash_across_dp_replicas_interval checkpoint_activations classes_fraction
    clip_grad clone_scatter_output_in_embedding config_logger_dir consumed_train_samples consumed_valid_samples
    context_parallel_size cp_comm_type create_attention_mask_in_dataloader cross_entropy_fusion_impl
    cross_entropy_loss_fusion curr_iteration data_sharding dataloader_type deallocate_pipeline_outputs
    decode_only_cuda_graphs decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
    decoder_pipeline_model_parallel_size decoder_seq_length decoupled_lr decoupled_min_lr
    decrease_batch_size_if_needed defer_embedding_wgrad_compute delay_grad_reduce delay_param_gather
    delay_wgrad_compute deprecated_use_mcore_models deterministic_mode disable_bf16_reduced_precision_matmul
    disable_chunked_prefill disable_jit_fuser disable_mamba_mem_eff_path disable_parameter_transpose_cache
    disable_straggler_on_startup disable_symmetric_registration distrib_optim_fully_reshardable_mem_efficient
    distribute_saved_activations do_test do_train do_valid dump_param_to_param_group_map
    embedding_init_method_std embedding_path empty_unused_memory_level enable_autocast enable_cuda_graph
    enable_experimental enable_ft_package enable_full_sharding_in_hsdp enable_gloo_process_groups enable_msc
    enable_one_logger encoder_pipeline_model_parallel_size encoder_seq_length encoder_tensor_model_parallel_size
    end_weight_decay eod_mask_loss ep_overlap_early_attn_memory_release evidence_data_path exit_duration_in_mins
    exit_interval exit_on_missing_checkpoint exit_signal exit_signal_handler exit_signal_handler_for_dataloader
    exp_avg_dtype exp_avg_sq_dtype expert_model_parallel_size expert_tensor_parallel_size external_cuda_graph
    fake_process_group fine_grained_activation_offloading finetune first_last_layers_bf16 flash_decode fp16
    fp16_lm_cross_entropy fp32_residual_connection fp4 fp8 full_validation fused_single_qkv_rope
    gated_linear_unit global_batch_size grad_reduce_in_bf16 gradient_accumulation_fusion
    gradient_reduce_div_fusion head_lr_mult heterogeneous_block_specs hidden_dropout
    hierarchical_context_parallel_sizes high_priority_stream_groups hysteresis img_h img_w init_method_std
    init_method_xavier_uniform init_model_with_meta_device initial_loss_scale iter_per_epoch iteration
    iterations_to_skip keep_fp8_transpose_cache lazy_mpu_init legacy_tokenizer linear_conv_kernel_dim
    linear_key_head_dim linear_num_key_heads linear_num_value_heads linear_value_head_dim load
    load_main_params_from_ckpt local_rank logging_level loss_scale loss_scale_window lr main_grads_dtype
    main_params_dtype make_vocab_size_divisible_by manual_gc manual_gc_eval manual_gc_interval mask_factor
    mask_prob mask_type masked_softmax_fusion max_seqlen_per_dp_cp_rank max_tokens_to_oom
    memory_efficient_layer_norm memory_snapshot_path merge_file micro_batch_size
    microbatch_group_size_per_vp_stage mid_level_dataset_surplus min_loss_scale min_lr min_offloaded_tensor_size
    mlp_chunks_for_prefill mmap_bin_files mock_data model_parallel_size model_type mscale mscale_all_dim
    mtp_loss_scaling_factor mtp_standalone multiple_validation_sets nccl_ub no_load_optim no_load_rng
    no_persist_layer_norm no_save_optim no_save_rng null_tokenizer_vocab_size num_channels num_classes
    num_dataset_builder_threads num_distributed_optimizer_instances num_floating_point_operations_so_far
    num_layers_at_end_in_bf16 num_layers_at_start_in_bf16 num_layers_in_first_pipeline_stage
    num_layers_in_last_pipeline_stage num_layers_per_virtual_pipeline_stage
    num_microbatches_with_partial_activation_checkpoints num_virtual_stages_per_pipeline_rank num_workers
    object_storage_cache_path offload_modules optimizer optimizer_cpu_offload optimizer_offload_fraction
    original_max_position_embeddings output_bert_embeddings overlap_cpu_optimizer_d2h_h2d overlap_grad_reduce
    overlap_moe_expert_parallel_comm overlap_p2p_comm overlap_p2p_comm_warmup_flush overlap_param_gather
    overlap_param_gather_with_optimizer_step override_opt_param_scheduler params_dtype patch_dim
    per_split_data_args_path perform_initialization perform_rl_step persist_layer_norm
    phase_transition_iterations pin_cpu_grads pin_cpu_params pipeline_dtype pipeline_model_parallel_comm_backend
    pipeline_model_parallel_layout pipeline_model_parallel_split_rank pretrained_checkpoint quant_recipe
    query_in_block_prob rampup_batch_size rank record_memory_history relative_attention_max_distance
    relative_attention_num_buckets replication replication_factor replication_jump reset_attention_mask
    reset_position_ids result_rejected_tracker_filename reuse_grad_buf_for_mxfp8_param_ag rope_scaling_factor
    rope_type rotary_scaling_factor run_workload_inspector_server sample_rate save save_interval
    save_retain_interval scatter_gather_tensors_in_pipeline seed sequence_parallel sft
    sft_tokenizer_prompt_format sgd_momentum sharp_enabled_group short_seq_prob skip_train skipped_train_samples
    split standalone_embedding_stage start_iteration start_weight_decay strict_fsdp_dtensor_load
    suggested_communication_unit_size swin_backbone_type symmetric_ar_type te_rng_tracker test_data_path
    test_mode timing_log_level timing_log_option titles_data_path tp_only_amax_red train_data_path train_iters
    train_samples train_sync_interval transformer_impl transformer_pipeline_model_parallel_size
    trust_remote_code use_checkpoint_args use_checkpoint_opt_param_scheduler use_cpu_initialization
    use_custom_fsdp use_dist_ckpt use_dist_ckpt_deprecated use_distributed_optimizer use_flash_attn
    use_fused_weighted_squared_relu use_legacy_models use_legacy_static_engine use_mamba_mem_eff_path
    use_mcore_models use_megatron_fsdp use_mp_args_from_checkpoint_args use_one_sent_docs
    use_persistent_ckpt_worker use_precision_aware_optimizer use_pytorch_profiler use_ring_exchange_p2p
    use_sharp use_te_activation_func use_te_rng_tracker use_tokenizer_model_from_checkpoint_args use_torch_fsdp2
    use_torch_optimizer_for_cpu_offload use_tp_pp_dp_mapping v_head_dim valid_data_path variable_seq_lengths
    virtual_pipeline_model_parallel_size vocab_extra_ids vocab_file warmup weight_decay weight_decay_incr_style
    wgrad_deferral_limit world_size yaml_cfg
    """
)
# prefixes of names: of training, logging and hardware, and of models that are turned off above
FAMILIES = tuple(
    _words(
        """
        adam_ adlr_ ckpt_ cpu_offloading cuda_graph_ data_ ddp_ dino_ dist_ckpt_ distributed_ dsa_ error_injection_
        eval_ fim_ fp4_ fp8_ fsdp_ ft_ grpo_ hybrid_context_ ict_ indexer_ inference_ inprocess_ kitchen_
        kv_lora_ langrl_ local_ckpt_ log_ lr_ mamba_ moe_ muon_ nccl_ non_persistent_ one_logger_ profile q_lora_
        qk_clip qk_head_ qk_pos_ recompute_ rerun_ retriever_ retro_ rl_ straggler_ tensorboard_ tiktoken_
        tokenizer_ torch_fsdp2_ tp_comm_ use_kitchen vision_ wandb_ workload_inspector_
        """
    )
)


@dataclass(frozen=True)
class Described:
    """A model, the tp x pp of its files (None if not stated), and its context in tokens."""

    model: ModelConfig
    tp: int | None
    pp: int | None
    context: int


def read_args(args: Mapping[str, Any], where: Path) -> Described:
    """The model that the arguments describe. Raises ValueError, naming the argument, for anything not supported."""
    fields = Fields({f"args.{key}": value for key, value in args.items()}, str(where))
    for key, value in args.items():
        known = key in NEUTRAL or key in READ or key in TRAINING or key.startswith(FAMILIES)
        off = value is None or (isinstance(value, int | float | str | list | tuple | dict) and not value)
        if not known and not off:
            raise fields.refuse(
                f"args.{key}", "is not a known argument of Megatron-LM, and may change the model; it must be off"
            )
    model = _model(fields)
    tp, pp = (fields.whole(f"args.{key}_model_parallel_size", None) for key in ("tensor", "pipeline"))
    context = fields.whole("args.max_position_embeddings", fields.whole("args.seq_length", 2048, 2048))
    return Described(model, tp, pp, context)


def _model(fields: Fields) -> ModelConfig:
    fields.neutral({f"args.{key}": allowed for key, allowed in NEUTRAL.items()}, "is not supported for this format")
    heads, hidden = fields.whole("args.num_attention_heads"), fields.whole("args.hidden_size")
    grouped = _on(fields, "group_query_attention", False)
    kv_heads = fields.whole("args.num_query_groups", heads, heads) if grouped else heads
    if heads % kv_heads:
        raise fields.refuse("args.num_query_groups", f"does not divide num_attention_heads={heads}")
    bias, head_dim = _on(fields, "add_bias_linear", True), hidden // heads
    return ModelConfig(
        vocab_size=_vocabulary(fields),
        hidden_size=hidden,
        num_layers=fields.whole("args.num_layers", high=10_000),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=fields.whole("args.kv_channels", head_dim, head_dim),
        ffn_hidden_size=fields.whole("args.ffn_hidden_size", 4 * hidden, 4 * hidden),
        norm_eps=fields.number("args.norm_epsilon", fields.number("args.layernorm_epsilon", 1e-5, 1e-5, low=0), low=0),
        tie_embeddings=not _on(fields, "untie_embeddings_and_output_weights", False),
        qkv_bias=_on(fields, "add_qkv_bias", False) and not bias,
        linear_bias=bias,
        norm=fields.choice("args.normalization", {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}, "LayerNorm"),
        activation=_activation(fields, bias),
        **_positions(fields),
    )


def _on(fields: Fields, key: str, default: bool) -> bool:
    """A switch; null means absent."""
    key = f"args.{key}"
    return default if fields.values.get(key) is None else fields.flag(key)


def _vocabulary(fields: Fields) -> int:
    """The vocabulary's size. The stored rows are padded for tp; if the true size is missing, all of them count."""
    if fields.values.get("args.vocab_size") is None:
        return fields.whole("args.padded_vocab_size")
    # NullTokenizer adds an end-of-document token to the given size
    null = fields.values.get("args.tokenizer_type") == "NullTokenizer"
    return fields.whole("args.vocab_size") + null


def _activation(fields: Fields, bias: bool) -> str:
    """The activation. GELU is the tanh approximation with openai_gelu, or if it is fused with the bias before it."""
    if _on(fields, "openai_gelu", False):
        if _on(fields, "swiglu", False):
            raise fields.refuse("args.openai_gelu", "with swiglu is not supported")
        return "gelu_tanh"
    if _on(fields, "swiglu", False):
        return "swiglu"
    return "gelu_tanh" if bias and _on(fields, "bias_gelu_fusion", True) else "gelu"


def _positions(fields: Fields) -> dict[str, Any]:
    kind = fields.word("args.position_embedding_type", "learned_absolute")
    if _on(fields, "use_rotary_position_embeddings", False):
        kind = "rope"
    if kind == "learned_absolute" and _on(fields, "add_position_embedding", True):
        return {"position": "learned", "max_positions": fields.whole("args.max_position_embeddings")}
    if kind != "rope":
        raise fields.refuse("args.position_embedding_type", "is not supported; use rope or learned_absolute", kind)
    if fields.number("args.rotary_base", 10000, 10000) != 10000:
        raise fields.refuse("args.rotary_base", "is not supported: the legacy model always rotates with 10000")
    found: dict[str, Any] = {"rope_fraction": fields.number("args.rotary_percent", 1.0, 1.0, above=0)}
    if found["rope_fraction"] > 1:
        raise fields.refuse("args.rotary_percent", "must be at most 1")
    factor = fields.number("args.rotary_seq_len_interpolation_factor", 1.0, 1.0, low=1)
    return found | ({"rope_scaling": "linear", "rope_factor": factor} if factor != 1.0 else {})
