"""Unigram and Kneser-Ney bigram baselines: the loss that counting reaches on the tokens that a model predicts."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megalite.data.indexed import IndexedDataset

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


class Baseline(Protocol):
    """A model of the next token given the token before it."""

    def probabilities(self, contexts: Ids, tokens: Ids) -> Floats:
        """Return P(token | context), [n], all above 0, of `tokens` [n] after `contexts` [n]."""
        ...


def total_nats(baseline: Baseline, indexed: IndexedDataset) -> float:
    """Return the sum of -ln P over all tokens but the first, the tokens that a model predicts in `heldout_windows`."""
    nats = 0.0
    previous = np.empty(0, dtype=np.int64)
    for _, chunk in indexed.chunks():
        stream = np.concatenate([previous, chunk.astype(np.int64)])
        nats -= float(np.log(baseline.probabilities(stream[:-1], stream[1:])).sum())
        previous = stream[-1:]
    return nats


class Unigram:
    """Add-one token frequencies; the context is ignored."""

    def __init__(self, indexed: IndexedDataset, vocab_size: int) -> None:
        counts = np.ones(vocab_size)
        for _, chunk in indexed.chunks():
            counts += np.bincount(chunk, minlength=vocab_size)
        self._probabilities: Floats = counts / counts.sum()

    def probabilities(self, contexts: Ids, tokens: Ids) -> Floats:
        return np.asarray(self._probabilities[tokens])


class KneserNeyBigram:
    """Interpolated Kneser-Ney (Kneser and Ney 1995): discounted bigrams, then continuation counts, then uniform.

    The lower order counts in how many contexts a token occurs, not how often. The discount of each order is
    n1 / (n1 + 2 n2), where n1 and n2 are how many of its counts are 1 and 2. Raises ValueError below 2 tokens.
    """

    def __init__(self, indexed: IndexedDataset, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._pairs, self._counts = _count_pairs(indexed, vocab_size)
        contexts, tokens = np.divmod(self._pairs, vocab_size)
        self._discount = _discount(self._counts)
        self._context_counts = np.bincount(contexts, weights=self._counts, minlength=vocab_size)
        followers = np.bincount(contexts, minlength=vocab_size)
        # An unseen context backs off completely.
        self._backoff = np.divide(
            self._discount * followers, self._context_counts, out=np.ones(vocab_size), where=followers > 0
        )
        continuations = np.bincount(tokens, minlength=vocab_size)
        seen = continuations[continuations > 0]
        discount = _discount(seen)
        self._lower = np.maximum(continuations - discount, 0) / max(len(self._pairs), 1)
        self._lower += (1 - self._lower.sum()) / vocab_size

    def probabilities(self, contexts: Ids, tokens: Ids) -> Floats:
        pairs = contexts * self.vocab_size + tokens
        at = np.searchsorted(self._pairs, pairs)
        at[at == len(self._pairs)] = 0
        counts = np.where(self._pairs[at] == pairs, self._counts[at], 0)
        discounted = np.maximum(counts - self._discount, 0) / np.maximum(self._context_counts[contexts], 1)
        return np.asarray(discounted + self._backoff[contexts] * self._lower[tokens])


def _count_pairs(indexed: IndexedDataset, vocab_size: int) -> tuple[Ids, Ids]:
    """Return the distinct bigrams as context * vocab_size + token, sorted, and their counts."""
    pairs = np.empty(0, dtype=np.int64)
    counts = np.empty(0, dtype=np.int64)
    previous = np.empty(0, dtype=np.int64)
    for _, chunk in indexed.chunks():
        stream = np.concatenate([previous, chunk.astype(np.int64)])
        new, new_counts = np.unique(stream[:-1] * vocab_size + stream[1:], return_counts=True)
        merged, where = np.unique(np.concatenate([pairs, new]), return_inverse=True)
        weights = np.concatenate([counts, new_counts])
        pairs, counts = merged, np.bincount(where, weights=weights, minlength=len(merged)).astype(np.int64)
        previous = stream[-1:]
    if not len(pairs):
        raise ValueError(f"{indexed.prefix}: has {indexed.num_tokens} tokens, but a bigram needs 2; use more data")
    return pairs, counts


def _discount(counts: Ids) -> float:
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    # If no count is 1 the estimate is 0, and unseen tokens would have probability 0.
    return once / (once + 2 * twice) if once else 0.5
