"""Megatron-LM's old layout, written here from known weights at tp x pp, comes in as those weights."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.checkpoint.contents import config_of
from megalite.checkpoint.folder import find, read_manifest
from megalite.checkpoint.load import read_tensor
from megalite.config import Config, ModelConfig, resolve
from megalite.config.shapes import shapes
from megalite.exchange.megatron import from_megatron

MODEL = resolve(
    Config(
        model=ModelConfig(
            vocab_size=53, hidden_size=24, num_layers=4, num_heads=6, num_kv_heads=2, ffn_hidden_size=20, qkv_bias=True
        )
    ),
    1,
).model
ARGS = {
    "num_layers": 4,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 4,
    "ffn_hidden_size": 20,
    "vocab_size": 53,
    "padded_vocab_size": 56,
    "norm_epsilon": 1e-5,
    "rotary_base": 10000,
    "swiglu": True,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "untie_embeddings_and_output_weights": True,
    "max_position_embeddings": 64,
}


def weights(model: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes(model).items()}


def write(folder: Path, whole: dict[str, torch.Tensor], tp: int, pp: int, rest: Any = None, **args: Any) -> None:
    """As Megatron-LM's checkpointing.py lays it out; its sharding is written out here by hand."""
    settings = ARGS | {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp} | args
    padded = {
        n: torch.cat([whole[n], torch.zeros(3, 24)]) for n in ("embed.weight", "loss_head.head.weight") if n in whole
    }
    per_stage = MODEL.num_layers // pp
    for p in range(pp):
        for t in range(tp):

            def rows(tensor: torch.Tensor, t: int = t) -> torch.Tensor:
                return tensor.chunk(tp)[t].clone()

            encoder = {}
            for i in range(per_stage):
                here, there = f"layers.{i + p * per_stage}", f"layers.{i}"
                gate, up = whole[f"{here}.mlp.gate_up.weight"].chunk(2)
                encoder |= {
                    f"{there}.input_norm.weight": whole[f"{here}.attn_norm.weight"],
                    f"{there}.self_attention.query_key_value.weight": rows(whole[f"{here}.attn.qkv.weight"]),
                    f"{there}.self_attention.query_key_value.bias": rows(whole[f"{here}.attn.qkv.bias"]),
                    f"{there}.self_attention.dense.weight": whole[f"{here}.attn.out.weight"].chunk(tp, 1)[t].clone(),
                    f"{there}.post_attention_norm.weight": whole[f"{here}.mlp_norm.weight"],
                    f"{there}.mlp.dense_h_to_4h.weight": torch.cat([rows(gate), rows(up)]),
                    f"{there}.mlp.dense_4h_to_h.weight": whole[f"{here}.mlp.down.weight"].chunk(tp, 1)[t].clone(),
                }
            model: dict[str, Any] = {"encoder": encoder}
            if p == 0:
                model["embedding"] = {"word_embeddings": {"weight": rows(padded["embed.weight"])}}
            if p == pp - 1:
                encoder["final_norm.weight"] = whole["loss_head.norm.weight"]
                if "loss_head.head.weight" in padded:
                    model["output_layer"] = {"weight": rows(padded["loss_head.head.weight"])}
            rank = folder / (f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else ""))
            rank.mkdir(parents=True)
            content = {"args": argparse.Namespace(**settings), "iteration": 5, "model": {"language_model": model}} | (
                rest or {}
            )
            torch.save(content, rank / "model_optim_rng.pt")


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_every_split_comes_in_as_the_same_weights(tp: int, pp: int, tied: bool, tmp_path: Path) -> None:
    model = dataclasses.replace(MODEL, tie_embeddings=tied)
    whole = weights(model)
    write(tmp_path / "old" / "iter_0000005", whole, tp, pp, untie_embeddings_and_output_weights=not tied)
    (tmp_path / "old" / "latest_checkpointed_iteration.txt").write_text("5\n")
    run = from_megatron(tmp_path / "old", tmp_path / "run", allow_pickle=True)
    manifest = read_manifest(find(run))
    assert dataclasses.asdict(config_of(manifest).model) == dataclasses.asdict(model)
    assert manifest["tensors"].keys() == {f"weight.{name}" for name in whole}
    for name, expected in whole.items():
        assert torch.equal(read_tensor(find(run), manifest, f"weight.{name}"), expected), name


def whole_tensor(run: Path, name: str) -> torch.Tensor:
    return read_tensor(find(run), read_manifest(find(run)), f"weight.{name}")


def test_a_pickle_needs_a_word(tmp_path: Path) -> None:
    write(tmp_path / "iter_0000005", weights(MODEL), 1, 1)
    with pytest.raises(ValueError, match=r"a format that can run code when opened.*add --allow-pickle"):
        from_megatron(tmp_path / "iter_0000005", tmp_path / "run", allow_pickle=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"swiglu": False}, r"layers\.0\.mlp\.up\.weight of tp rank 0 is \[20, 24\], not \[10, 24\]"),
        ({"num_experts": 8}, "args.num_experts=8"),
        ({"position_embedding_type": "learned_absolute"}, "pos_embed.weight is missing"),
        ({"position_embedding_type": "relative"}, 'args.position_embedding_type="relative" is not supported'),
        ({"apply_residual_connection_post_layernorm": True}, "args.apply_residual_connection_post_layernorm=true"),
        ({"apply_layernorm_1p": True}, "args.apply_layernorm_1p=true"),
        (
            {"rotary_base": 500000},
            "args.rotary_base=500000 is not supported: the legacy model always rotates with 10000",
        ),
        ({"rotary_interleaved": True}, "args.rotary_interleaved=true"),
        ({"rotary_percent": 0.4}, "model.rope_fraction=0.4 rotates 1 of head_dim 4"),
        ({"rotary_percent": 1.5}, "args.rotary_percent=1.5 must be at most 1"),
        ({"squared_relu": True}, "args.squared_relu=true"),
        ({"openai_gelu": True}, "args.openai_gelu=true with swiglu"),
        ({"qk_layernorm": True}, "args.qk_layernorm=true"),
        ({"multi_latent_attention": True}, "args.multi_latent_attention=true"),
        ({"window_size": (128, 0)}, "args.window_size="),
        ({"use_rope_scaling": True}, "args.use_rope_scaling=true"),
        ({"normalization": "L2Norm"}, 'args.normalization="L2Norm"'),
        ({"add_bias_linear": True}, "attn.out.bias is missing"),
        ({"add_qkv_bias": False}, "layers.0.attn.qkv.bias does not belong"),
        ({"heads_of_a_fork": 3}, "args.heads_of_a_fork=3 is not a known argument of Megatron-LM"),
        ({"num_attention_heads": 6.0}, "args.num_attention_heads=6.0 is not of type int"),
        ({"num_query_groups": 4}, "args.num_query_groups=4 does not divide"),
        ({"norm_epsilon": float("nan")}, "args.norm_epsilon=NaN must be a finite number"),
        ({"tensor_model_parallel_size": 4}, "holds 2 ranks, not tp 4 x pp 1"),
        ({"num_layers": 6}, "layers.4.attn_norm.weight is missing"),
        ({"ffn_hidden_size": 40}, r"mlp.gate_up.weight of tp rank 0 is \[20, 24\], not \[40, 24\]"),
        ({"vocab_size": 99}, r"embed.weight is \[56, 24\], the arguments of the run say \[99, 24\]"),
    ],
)
def test_options_that_are_not_supported_are_named(tmp_path: Path, args: dict[str, Any], message: str) -> None:
    write(tmp_path / "iter_0000005", weights(MODEL), 2, 1, **args)
    with pytest.raises(ValueError, match=message):
        from_megatron(tmp_path / "iter_0000005", tmp_path / "run", allow_pickle=True)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000005"]


def test_a_missing_rank_and_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "iter_0000005", weights(MODEL), 2, 2)
    gone = tmp_path / "iter_0000005" / "mp_rank_01_001"
    (gone / "model_optim_rng.pt").unlink()
    with pytest.raises(ValueError, match="not a Megatron-LM checkpoint"):
        from_megatron(tmp_path / "iter_0000005", tmp_path / "run", allow_pickle=True)
    gone.rmdir()
    with pytest.raises(ValueError, match="holds 3 ranks, not tp 2 x pp 2; copy all"):
        from_megatron(tmp_path / "iter_0000005", tmp_path / "run", allow_pickle=True)
    with pytest.raises(ValueError, match="has no mp_rank_NN folder"):
        from_megatron(tmp_path, tmp_path / "run", allow_pickle=True)


def test_a_distributed_checkpoint_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "iter_0000005").mkdir()
    (tmp_path / "iter_0000005" / "__0_0.distcp").touch()
    with pytest.raises(ValueError, match="a distributed checkpoint of megatron-core, which is not supported"):
        from_megatron(tmp_path / "iter_0000005", tmp_path / "run", allow_pickle=True)
