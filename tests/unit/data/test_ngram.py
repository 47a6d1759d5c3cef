import math
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from megalite.data import indexed as indexed_module
from megalite.data.corpus import Corpus
from megalite.data.indexed import IndexedDataset
from megalite.data.ngram import KneserNeyBigram, Unigram, total_nats

VOCAB = 50


class SlowKneserNey:
    """The textbook formulas over dictionaries."""

    def __init__(self, stream: list[int], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.pairs = Counter(pairwise(stream))
        self.followers, self.preceders = defaultdict(set), defaultdict(set)
        for context, token in self.pairs:
            self.followers[context].add(token)
            self.preceders[token].add(context)
        self.contexts = Counter(stream[:-1])
        self.discount = self.estimate(list(self.pairs.values()))
        self.lower_discount = self.estimate([len(found) for found in self.preceders.values()])

    @staticmethod
    def estimate(counts: list[int]) -> float:
        return counts.count(1) / (counts.count(1) + 2 * counts.count(2)) if counts.count(1) else 0.5

    def lower(self, token: int) -> float:
        kept = max(len(self.preceders[token]) - self.lower_discount, 0) if token in self.preceders else 0
        seen = sum(1 for found in self.preceders.values() if found)
        return (kept + self.lower_discount * seen / self.vocab_size) / len(self.pairs)

    def probability(self, context: int, token: int) -> float:
        if context not in self.followers:
            return self.lower(token)
        kept = max(self.pairs[context, token] - self.discount, 0)
        rest = self.discount * len(self.followers[context])
        return (kept + rest * self.lower(token)) / self.contexts[context]


def everything(model: Unigram | KneserNeyBigram) -> np.ndarray:
    """P(token | context) as [VOCAB, VOCAB]."""
    contexts, tokens = np.divmod(np.arange(VOCAB * VOCAB), VOCAB)
    return model.probabilities(contexts, tokens).reshape(VOCAB, VOCAB)


@pytest.mark.parametrize("kind", [Unigram, KneserNeyBigram])
def test_probabilities_sum_to_one_after_every_context(noise: IndexedDataset, kind: type):
    table = everything(kind(noise, VOCAB))
    np.testing.assert_allclose(table.sum(axis=1), 1, rtol=1e-12)
    assert (table > 0).all()


def test_bigram_against_the_textbook(noise: IndexedDataset):
    slow = SlowKneserNey(noise.tokens(0, noise.num_tokens).tolist(), VOCAB)
    expected = [[slow.probability(context, token) for token in range(VOCAB)] for context in range(VOCAB)]
    np.testing.assert_allclose(everything(KneserNeyBigram(noise, VOCAB)), expected, rtol=1e-12)


def test_counts_without_a_one_leave_no_zero(write):
    table = everything(KneserNeyBigram(write([0, 1] * 10), VOCAB))
    assert (table > 0).all()
    np.testing.assert_allclose(table.sum(axis=1), 1, rtol=1e-12)


def test_unigram_adds_one(write):
    model = Unigram(write([3, 3, 4]), 5)
    expected = np.array([1, 1, 1, 3, 2]) / 8
    np.testing.assert_allclose(model.probabilities(np.zeros(5, int), np.arange(5)), expected)


def test_total_is_over_all_tokens_but_the_first(write):
    train = write([1, 2, 3, 1, 2, 1, 1], name="train")
    heldout = write([2, 1], [1, 3], name="heldout")
    model = KneserNeyBigram(train, 5)
    slow = SlowKneserNey([1, 2, 3, 1, 2, 1, 1], 5)
    expected = -sum(math.log(slow.probability(*pair)) for pair in [(2, 1), (1, 1), (1, 3)])
    assert total_nats(model, heldout) == pytest.approx(expected, rel=1e-12)


def test_chunks_do_not_matter(noise: IndexedDataset, monkeypatch: pytest.MonkeyPatch):
    whole = KneserNeyBigram(noise, VOCAB)
    nats = total_nats(whole, noise)
    monkeypatch.setattr(indexed_module, "CHUNK", 7)
    np.testing.assert_array_equal(everything(KneserNeyBigram(noise, VOCAB)), everything(whole))
    assert total_nats(whole, noise) == pytest.approx(nats, rel=1e-12)


def test_bigram_beats_unigram_on_the_corpus(corpus: Corpus):
    train = IndexedDataset(corpus.train)
    heldout = IndexedDataset(corpus.heldout["en"])
    unigram, bigram = (total_nats(kind(train, 600), heldout) for kind in (Unigram, KneserNeyBigram))
    assert 3.3 < bigram / (heldout.num_tokens - 1) < 3.5
    assert unigram / bigram > 1.5


def test_one_token_has_no_bigram(write):
    with pytest.raises(ValueError, match="has 1 tokens, but a bigram needs 2"):
        KneserNeyBigram(write([1]), 5)
