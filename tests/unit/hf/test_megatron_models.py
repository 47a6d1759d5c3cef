"""Models of transformers laid out as Megatron-LM's legacy models come in with transformers' logits.

The layout is written here from megatron/legacy/model/{language_model,transformer}.py and tools/checkpoint, by hand.
"""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.hf.megatron import from_megatron
from megalite.hf.verify import load_decoder

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
        ours = decoder(TOKENS, torch.arange(TOKENS.shape[1]).expand(len(TOKENS), -1))
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5


STAGES = [
    [[5]],
    [[2], [3]],  # as an uneven split has them, --decoder-first-pipeline-num-layers
    [[0], [5]],  # a stage of the embedding alone
    [[1], [3], [1]],
    [[1, 1], [2, 1]],  # two virtual stages on each of two ranks
    [[1, 0], [1, 1], [1, 1]],
]


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
        (lambda c: c.pop("args"), "holds no args"),
        (lambda c: c.pop("model"), "holds no model.language_model"),
        (lambda c: c.update(model={"decoder.layers.0.mlp": torch.zeros(2)}), "holds no model.language_model"),
        (lambda c: c.update(checkpoint_version=1.0), "checkpoint_version=1.0 is not supported"),
        (lambda c: c.update(iteration=6), "is of another run or iteration than mp_rank_00"),
        (lambda c: setattr(c["args"], "norm_epsilon", 1e-3), "is of another run or iteration than mp_rank_00"),
        (lambda c: c["model"]["language_model"]["encoder"].pop("layers.0.input_norm.weight"), "different tensors"),
        (lambda c: c["model"]["language_model"]["encoder"]["layers.0.input_norm.weight"].add_(1), "differs between tp"),
        (
            lambda c: c["model"]["language_model"]["encoder"].update({"x.weight": 3}),
            "encoder.x.weight is no plain tensor",
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
