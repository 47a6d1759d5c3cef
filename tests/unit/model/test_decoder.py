"""The plain model: what its parts mean, whatever the cut."""

import dataclasses

import pytest
import torch
from models import tiny
from torch import Tensor
from torch.nn import functional as F

from megalite import ops
from megalite.config import ResolvedModel
from megalite.config.shapes import shapes
from megalite.model.context import Context
from megalite.model.decoder import Decoder

MODEL = tiny(vocab_size=31, num_layers=3, ffn_hidden_size=20, qkv_bias=True, qk_norm=True)
B, S = 2, 10


def make(model: ResolvedModel, **kwargs: object) -> Decoder:
    """A decoder with weights large enough that every part shows in the output."""
    torch.manual_seed(0)
    decoder = Decoder(model, kwargs.pop("layers", range(model.num_layers)), **kwargs).double()
    with torch.no_grad():
        for p in decoder.parameters():
            p.normal_(1.0 if p.dim() == 1 and p.numel() in (6, 24) else 0.0, 0.3)
    return decoder


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 31, (B, S), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def positions() -> Tensor:
    return torch.arange(S).expand(B, S)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_names(tied: bool, extras: bool) -> None:
    model = dataclasses.replace(MODEL, tie_embeddings=tied, qkv_bias=extras, qk_norm=extras)
    decoder = make(model)
    assert sorted(dict(decoder.named_parameters())) == sorted(shapes(model))
    assert decoder.embed is not None
    assert decoder.loss_head is not None
    assert (decoder.loss_head.head.weight is decoder.embed.weight) == tied


def test_a_stage_has_the_whole_models_names() -> None:
    whole = set(dict(make(MODEL).named_parameters()))
    stages = [
        set(dict(make(MODEL, layers=layers, first=first, last=last).named_parameters()))
        for layers, first, last in (([0], True, False), ([1], False, False), ([2], False, True))
    ]
    assert set.union(*stages) == whole
    assert sum(map(len, stages)) == len(whole)


def test_stages_in_a_row_are_the_model(tokens: Tensor, positions: Tensor) -> None:
    model = make(MODEL)
    first, last = make(MODEL, layers=[0, 1], last=False), make(MODEL, layers=[2], first=False)
    for stage in (first, last):
        stage.load_state_dict({k: v for k, v in model.state_dict().items() if k in stage.state_dict()})
    hidden = first(tokens, Context(positions))
    assert hidden.shape == (B, S, 24)
    assert torch.equal(last(hidden, Context(positions)), model(tokens, Context(positions)))


def test_loss_is_the_masked_sum_of_the_logits_cross_entropy(tokens: Tensor, positions: Tensor) -> None:
    model = make(MODEL)
    labels, mask = tokens.flip(0), (torch.arange(S).expand(B, S) % 3 > 0).double()
    logits = model(tokens, Context(positions))
    assert logits.shape == (B, S, 31)
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(B, S)
    loss = model(tokens, Context(positions), labels=labels, loss_mask=mask)["loss"]
    torch.testing.assert_close(loss, (ce * mask).sum(), rtol=1e-14, atol=0)

    loss = model(tokens, Context(positions), labels=labels, loss_mask=torch.zeros(B, S))["loss"]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and bool((p.grad == 0).all()) for p in model.parameters())


def test_cross_entropy_of_half_precision_is_taken_in_fp32(tokens: Tensor) -> None:
    loss_head = make(MODEL).loss_head
    assert loss_head is not None
    logits = torch.randn(B, S, 31, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = loss_head.cross_entropy(logits, tokens, torch.ones(B, S))
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(logits.double().flatten(0, 1), tokens.flatten(), reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


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


def test_label_smoothing_is_of_training_alone(tokens: Tensor, positions: Tensor) -> None:
    plain, smooth = make(MODEL), make(MODEL, label_smoothing=0.2)
    args = (tokens, Context(positions), tokens.flip(0), torch.ones(B, S))
    assert not torch.allclose(plain(*args)["loss"], smooth(*args)["loss"])
    assert torch.equal(plain(*args)["loss"], smooth.eval()(*args)["loss"])


def test_attention_sees_relative_positions(tokens: Tensor, positions: Tensor) -> None:
    model = make(dataclasses.replace(MODEL, rope_theta=50.0))
    expected = model(tokens, Context(positions))
    torch.testing.assert_close(model(tokens, Context(positions + 3)), expected, rtol=1e-4, atol=1e-4)  # angles are fp32
    assert not torch.allclose(model(tokens, Context(positions * 2)), expected, atol=1e-2)


@pytest.mark.parametrize(
    "field", [{"index": torch.arange(S)}, {"extra": {"image": torch.zeros(1)}}], ids=["index", "extra"]
)
def test_an_unsupported_field_of_the_context_is_refused(field: dict, tokens: Tensor, positions: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Context\.index and Context\.extra are not supported"):
        make(MODEL)(tokens, Context(positions, **field))


def test_rotary_tables_of_the_caller_are_used(tokens: Tensor, positions: Tensor) -> None:
    model = make(MODEL)
    rope = ops.rope_cos_sin(positions + 2, model.rot_dim, model.rope_theta, torch.float64)
    expected = model(tokens, Context(positions + 2))
    assert torch.equal(model(tokens, Context(positions, rope=rope)), expected)
    assert not torch.equal(model(tokens, Context(positions)), expected)


def test_a_head_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^head=masked is not supported; use next-token$"):
        Decoder(MODEL, range(1), head="masked")
