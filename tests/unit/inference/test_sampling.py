import pytest
import torch
from torch import Tensor
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megalite.inference.reply import Settings
from megalite.inference.sampling import choose, nucleus, penalised, top_k

VOCAB = 50


@pytest.fixture
def logits() -> Tensor:
    return 3 * torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0))


def generators(rows: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(rows)]


@pytest.mark.parametrize("k", [1, 7, 49, 50, 80])
def test_top_k_is_transformers(k: int, logits: Tensor) -> None:
    logits[0, :20] = 5.0  # a tie
    assert torch.equal(top_k(logits, k), TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_is_transformers(p: float, logits: Tensor) -> None:
    assert torch.equal(nucleus(logits, p), TopPLogitsWarper(p)(None, logits))


def test_top_p_keeps_the_likeliest_tokens_that_reach_p() -> None:
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
    for p, kept in ((0.4, [1]), (0.6, [1, 2]), (0.81, [0, 1, 2]), (1.0, [0, 1, 2])):
        assert nucleus(logits, p)[0].isfinite().nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
def test_repetition_penalty_is_transformers(penalty: float, logits: Tensor) -> None:
    tokens = torch.randint(0, VOCAB, (6, 9), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(6, VOCAB, dtype=torch.bool).scatter(1, tokens, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits)
    assert torch.equal(penalised(logits, seen, penalty), expected)


def test_all_in_the_order_of_transformers(logits: Tensor) -> None:
    """The tokens that can be drawn, and how often, are those of its processors in its order."""
    tokens = logits.topk(4).indices
    expected = RepetitionPenaltyLogitsProcessor(1.5)(tokens, logits)
    for warper in (TemperatureLogitsWarper(0.8), TopKLogitsWarper(9), TopPLogitsWarper(0.8)):
        expected = warper(None, expected)
    seen = torch.zeros(6, VOCAB, dtype=torch.bool).scatter(1, tokens, True)
    settings = Settings(temperature=0.8, top_k=9, top_p=0.8, repetition_penalty=1.5)
    drawn, draws = torch.zeros(6, VOCAB), 3000
    generator = generators(6)
    for _ in range(draws):
        drawn.scatter_add_(1, choose(logits, seen, settings, generator)[:, None], torch.ones(6, 1))
    probabilities = expected.softmax(-1)
    assert not drawn[probabilities == 0].any()
    # five standard deviations
    assert ((drawn / draws - probabilities).abs() <= 5 * (probabilities / draws).sqrt() + 1e-9).all()


def test_greedy_is_the_largest_after_the_penalty() -> None:
    logits = torch.tensor([[3.0, 2.9, -1.0]])
    seen = torch.tensor([[True, False, False]])
    assert choose(logits, seen, Settings(), generators(1)).tolist() == [0]
    assert choose(logits, seen, Settings(repetition_penalty=1.1), generators(1)).tolist() == [1]


def test_a_row_draws_by_its_own_generator(logits: Tensor) -> None:
    seen = torch.zeros(6, VOCAB, dtype=torch.bool)
    together = choose(logits, seen, Settings(temperature=1.0), generators(6))
    alone = [choose(logits[i : i + 1], seen[:1], Settings(temperature=1.0), generators(1, i)) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))
