"""The loss weight of each token of a rendered conversation, from the characters that the token covers."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megalite.text.chat import Rendered
from megalite.text.messages import Conversation, RowError
from megalite.text.tokenizer import Encoding

# (start, stop, weight): characters [start, stop) and the loss weight of their tokens
WeightedSpan = tuple[int, int, float]


def weighted_spans(conversation: Conversation, rendered: Rendered, train_on: str) -> list[WeightedSpan]:
    """Return the trained spans of a rendered conversation and their weights.

    train_on: `assistant` trains all its messages, with the row's weights; `last` trains the last of these; `all`
    trains the whole text with weight 1.

    Raises RowError if the text drops or changes a trained message, or if its characters are unknown.
    """
    messages, weights = conversation.messages, [_or_one(weight) for weight in conversation.weights]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    selected = answers[-1:] if train_on == "last" else answers
    for answer in selected:
        if weights[answer] or train_on == "all":
            reason = rendered.changed.get(answer) or (train_on != "all" and rendered.refused.get(answer))
            if reason:
                raise RowError(reason)
    if train_on == "all":
        return [(0, len(rendered.text), 1.0)]
    found = list[WeightedSpan]()
    for span in rendered.spans:
        if span.message not in selected:
            continue
        inside = [answer for answer in answers if span.since <= answer <= span.message]
        if len({weights[answer] if answer in selected else 0.0 for answer in inside}) > 1:
            raise RowError(
                f"the template puts messages {span.since + 1} to {span.message + 1} into one generation block, so they "
                f"cannot have different weights"
            )
        if found and found[-1][1] == span.start and found[-1][2] == weights[span.message]:
            found[-1] = (found[-1][0], span.stop, found[-1][2])
        else:
            found.append((span.start, span.stop, weights[span.message]))
    return found


def _or_one(weight: float | None) -> float:
    return 1.0 if weight is None else weight


def token_weights(text: str, encoding: Encoding, spans: Sequence[WeightedSpan]) -> NDArray[np.float64]:
    """Return the weight of each token, [tokens]: that of the span that contains all its characters, else 0.

    Leading whitespace of a token is ignored: tokenizers put the space before a word into the word's token, and that
    space may be outside the span.
    """
    weights = np.zeros(len(encoding.ids))
    current = 0
    for i, (start, stop) in enumerate(encoding.spans):
        while current < len(spans) and spans[current][1] < stop:
            current += 1
        if current == len(spans):
            break
        first, last, weight = spans[current]
        inner = start
        while inner < stop and text[inner].isspace():
            inner += 1
        begins = inner if inner < stop else start
        # a token without characters, such as a dummy prefix space, counts inside a span but not at its border
        if first <= begins < stop <= last or first < start == stop < last:
            weights[i] = weight
    return weights


class UntrainedError(RowError):
    """A valid row that has no trained token."""


def require_trained(weights: NDArray[np.float64]) -> None:
    """Raise UntrainedError if all weights [tokens] but the first, which is never predicted, are 0."""
    if not weights[1:].any():
        raise UntrainedError("has no trained token: its answers are empty or have weight 0")
