"""Megatron-LM's arguments as a model: defaults, aliases, and what is refused by name."""

from pathlib import Path
from typing import Any

import pytest

from megalite.exchange.megatron_args import Described, read_args

WHERE = Path("iter_0000005")
BASE = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "padded_vocab_size": 128}
BASE |= {"max_position_embeddings": 32}


def read(**args: Any) -> Described:
    return read_args(BASE | args, WHERE)


def test_the_defaults_are_those_of_gpt() -> None:
    found = read()
    m = found.model
    assert (m.num_kv_heads, m.head_dim, m.ffn_hidden_size, m.vocab_size) == (4, 16, 256, 128)
    assert (m.norm, m.activation, m.position, m.max_positions) == ("layernorm", "gelu_tanh", "learned", 32)
    assert m.linear_bias
    assert m.tie_embeddings
    assert (found.tp, found.pp, found.context) == (None, None, 32)


def test_a_llama() -> None:
    found = read(
        group_query_attention=True,
        num_query_groups=2,
        swiglu=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        position_embedding_type="rope",
        untie_embeddings_and_output_weights=True,
        vocab_size=100,
        norm_epsilon=1e-6,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=1,
    )
    m = found.model
    assert (m.num_kv_heads, m.activation, m.norm, m.position) == (2, "swiglu", "rmsnorm", "rope")
    assert (m.vocab_size, m.norm_eps, m.tie_embeddings, m.linear_bias) == (100, 1e-6, False, False)
    assert (found.tp, found.pp) == (2, 1)


@pytest.mark.parametrize(
    ("args", "activation"),
    [
        ({}, "gelu_tanh"),
        ({"bias_gelu_fusion": False}, "gelu"),
        ({"add_bias_linear": False}, "gelu"),
        ({"bias_gelu_fusion": False, "openai_gelu": True}, "gelu_tanh"),
        ({"swiglu": True}, "swiglu"),
    ],
)
def test_which_gelu_it_was(args: dict[str, Any], activation: str) -> None:
    assert read(**args).model.activation == activation


def test_a_tokenizer_of_numbers_adds_a_token() -> None:
    assert read(vocab_size=100, tokenizer_type="NullTokenizer").model.vocab_size == 101


def test_arguments_of_training_may_have_any_value_and_unknown_ones_must_be_off() -> None:
    assert read(lr=1e-3, moe_router_topk=2, of_a_fork=False, another=None, third=[]) == read()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"of_a_fork": 1}, "args.of_a_fork=1 is not a known argument of Megatron-LM, and may change the model"),
        ({"num_experts": 8}, "args.num_experts=8 is not supported for this format"),
        ({"num_attention_heads": None}, "args.num_attention_heads=null is not of type int"),
        ({"group_query_attention": True, "num_query_groups": 3}, "args.num_query_groups=3 does not divide"),
        ({"rotary_percent": 2.0, "position_embedding_type": "rope"}, "args.rotary_percent=2.0 must be at most 1"),
        ({"position_embedding_type": "relative"}, 'position_embedding_type="relative" is not supported; use rope or'),
    ],
)
def test_what_is_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^iter_0000005: ") as error:
        read(**args)
    assert message in str(error.value)
