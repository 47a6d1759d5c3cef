"""Attention: which keys a query sees, how heads are grouped, and how each kernel agrees with the definition."""

import dataclasses

import pytest
import torch
from decoders import MODEL, B, S, make
from torch import Tensor

from megalite.model.context import Context


@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_grouped_heads_are_repeated_heads(kernel: str, tokens: Tensor, positions: Tensor) -> None:
    """GQA equals multi-head attention whose key and value heads are copies within each group."""
    grouped = make(MODEL, kernel=kernel)
    full = make(dataclasses.replace(MODEL, num_kv_heads=4), kernel=kernel)

    def repeated(rows: Tensor) -> Tensor:
        q = rows.unflatten(0, (2, 4, 6))[:, :2].flatten(0, 1)  # [4, 6, ...] query heads
        k, v = (rows.unflatten(0, (2, 4, 6))[:, i].repeat_interleave(2, 0) for i in (2, 3))
        return torch.stack([q, k, v], 1).flatten(0, 2)

    full.load_state_dict({k: repeated(v) if ".qkv." in k else v for k, v in grouped.state_dict().items()})
    torch.testing.assert_close(
        full(tokens, Context(positions)), grouped(tokens, Context(positions)), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_causal(kernel: str, tokens: Tensor, positions: Tensor) -> None:
    model = make(MODEL, kernel=kernel)
    before = model(tokens, Context(positions))
    for changed in (S - 1, 4):
        other = tokens.clone()
        other[:, changed] = (other[:, changed] + 1) % 31
        after = model(other, Context(positions))
        assert torch.equal(after[:, :changed], before[:, :changed])
        assert bool((after[:, changed:] != before[:, changed:]).flatten(2).any(2).all())  # and it does reach these


def test_bounds_isolate_documents(tokens: Tensor, positions: Tensor) -> None:
    model = make(MODEL)
    starts = torch.zeros(B, S, dtype=torch.long)
    starts[0, 3:], starts[0, 7:], starts[1, 5:] = 3, 7, 5
    bounds = torch.stack([starts, positions + 1], -1)
    together = model(tokens, Context(positions - starts, bounds))
    for b, first, last in ((0, 0, 3), (0, 3, 7), (0, 7, 10), (1, 0, 5), (1, 5, 10)):
        apart = model(tokens[b : b + 1, first:last], Context(positions[:1, : last - first]))
        torch.testing.assert_close(together[b : b + 1, first:last], apart, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(together, model(tokens, Context(positions)))


def test_bounds_of_one_document_are_plain_causal_attention(tokens: Tensor, positions: Tensor) -> None:
    model = make(MODEL)
    bounds = torch.stack([torch.zeros_like(positions), positions + 1], -1)
    torch.testing.assert_close(
        model(tokens, Context(positions, bounds)), model(tokens, Context(positions)), rtol=1e-12, atol=1e-12
    )


def test_bounds_may_look_ahead(tokens: Tensor, positions: Tensor) -> None:
    """Full attention is bounds too: the mask comes from the batch, not from the model."""
    model = make(MODEL)
    bounds = torch.tensor([0, S]).expand(B, S, 2)
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % 31
    assert not torch.allclose(
        model(tokens, Context(positions, bounds))[:, 0], model(other, Context(positions, bounds))[:, 0]
    )


@pytest.mark.parametrize("bounded", [False, True])
def test_a_window_hides_what_lies_before_it(bounded: bool, tokens: Tensor, positions: Tensor) -> None:
    """One layer: query i sees key j where i - j < window."""
    model = make(dataclasses.replace(MODEL, num_layers=1, sliding_window=3))
    bounds = torch.stack([torch.zeros_like(positions), positions + 1], -1) if bounded else None
    before = model(tokens, Context(positions, bounds))
    other = tokens.clone()
    other[:, 4] = (other[:, 4] + 1) % 31
    changed = (model(other, Context(positions, bounds)) != before).any(-1).any(0)
    assert changed.tolist() == [4 <= i < 4 + 3 for i in range(S)]


def test_a_window_as_long_as_the_sequence_hides_nothing(tokens: Tensor, positions: Tensor) -> None:
    model, wide = make(MODEL), make(dataclasses.replace(MODEL, sliding_window=S))
    assert torch.equal(model(tokens, Context(positions)), wide(tokens, Context(positions)))


def test_attention_sees_relative_positions(tokens: Tensor, positions: Tensor) -> None:
    model = make(dataclasses.replace(MODEL, rope_theta=50.0))
    expected = model(tokens, Context(positions))
    torch.testing.assert_close(model(tokens, Context(positions + 3)), expected, rtol=1e-4, atol=1e-4)  # angles are fp32
    assert not torch.allclose(model(tokens, Context(positions * 2)), expected, atol=1e-2)
