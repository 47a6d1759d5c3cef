"""Names and shapes in Hugging Face's files, by hand; test_layouts.py compares them with transformers' own."""

import subprocess
import sys

import pytest
from models import tiny

from megalite.config.shapes import shapes
from megalite.model.names import hf_shapes, is_transposed, names_there

GPT2 = {
    "position": "learned",
    "max_positions": 13,
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "linear_bias": True,
    "num_kv_heads": 4,
    "tie_embeddings": True,
}


def test_llama_by_hand() -> None:
    layer = {
        "input_layernorm": (24,),
        "self_attn.q_proj": (24, 24),
        "self_attn.k_proj": (12, 24),
        "self_attn.v_proj": (12, 24),
        "self_attn.o_proj": (24, 24),
        "post_attention_layernorm": (24,),
        "mlp.gate_proj": (36, 24),
        "mlp.up_proj": (36, 24),
        "mlp.down_proj": (24, 36),
    }
    expected = {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    expected |= {"model.embed_tokens.weight": (101, 24), "model.norm.weight": (24,), "lm_head.weight": (101, 24)}
    assert hf_shapes(tiny()) == expected


def test_gpt2_by_hand() -> None:
    """One matrix for query, key and value, [in, out]; embeddings are not transposed, and the head is tied."""
    found = hf_shapes(tiny(**GPT2))
    assert found["transformer.h.1.attn.c_attn.weight"] == (24, 72)
    assert found["transformer.h.1.attn.c_attn.bias"] == (72,)
    assert found["transformer.h.0.mlp.c_fc.weight"] == (24, 36)
    assert found["transformer.h.0.mlp.c_proj.weight"] == (36, 24)
    assert found["transformer.wte.weight"] == (101, 24)
    assert found["transformer.wpe.weight"] == (13, 24)
    assert not any(name.startswith("lm_head") for name in found)


def test_a_tied_head_is_left_out() -> None:
    untied, tied = hf_shapes(tiny()), hf_shapes(tiny(tie_embeddings=True))
    assert untied.keys() - tied.keys() == {"lm_head.weight"}
    assert tied.keys() <= untied.keys()


def test_only_matrices_of_gpt2s_blocks_are_transposed() -> None:
    model = tiny(**GPT2)
    transposed = {name for name in shapes(model) if is_transposed(name, model)}
    assert transposed == {
        f"layers.{i}.{n}.weight" for i in range(2) for n in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
    }
    assert not any(is_transposed(name, tiny()) for name in shapes(tiny()))


def test_a_fused_matrix_has_its_parts_in_the_order_of_rows() -> None:
    assert names_there("layers.3.attn.qkv.bias", tiny(qkv_bias=True)) == [
        f"model.layers.3.self_attn.{name}_proj.bias" for name in "qkv"
    ]
    assert names_there("layers.0.mlp.gate_up.weight", tiny()) == [
        f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")
    ]


@pytest.mark.parametrize("name", ["layers.0.mlp.shift", "pos_embed.weight", "layers.x.mlp.down.weight", ""])
def test_a_name_without_counterpart_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"^'{name}' has no counterpart in Hugging Face's Llama, Qwen2, Qwen3 or GPT-2$"
    ):
        names_there(name, tiny())


def test_names_need_no_torch() -> None:
    code = "import megalite.model.names, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
