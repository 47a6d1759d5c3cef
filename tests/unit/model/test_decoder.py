"""The plain model: what its parts mean, whatever the cut."""

import dataclasses

import pytest
import torch
from decoders import MODEL, B, S, make
from torch import Tensor
from torch.nn import functional as F

from megalite import ops
from megalite.config.shapes import shapes
from megalite.model.context import Context
from megalite.model.decoder import Decoder


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


def test_label_smoothing_is_of_training_alone(tokens: Tensor, positions: Tensor) -> None:
    plain, smooth = make(MODEL), make(MODEL, label_smoothing=0.2)
    args = (tokens, Context(positions), tokens.flip(0), torch.ones(B, S))
    assert not torch.allclose(plain(*args)["loss"], smooth(*args)["loss"])
    assert torch.equal(plain(*args)["loss"], smooth.eval()(*args)["loss"])


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
