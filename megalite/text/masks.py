"""How much each token of a rendered conversation counts in the loss, from the characters it stands for."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megalite.text.chat import Rendered
from megalite.text.messages import Conversation, RowError
from megalite.text.tokenizer import Encoding

Weighted = tuple[int, int, float]


def weighted_spans(conversation: Conversation, rendered: Rendered, train_on: str) -> list[Weighted]:
    """Spans of characters and what each of their tokens counts.

    train_on: `assistant`, all its messages, each by its own weight where the row gives one; `last`, of these the last
    message alone; `all`, the whole text evenly. RowError where a message that is asked for is not shown as it is, or
    cannot be told from the rest.
    """
    messages, weights = conversation.messages, [_or_one(weight) for weight in conversation.weights]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    asked = answers[-1:] if train_on == "last" else answers
    for answer in asked:
        if weights[answer] or train_on == "all":
            reason = rendered.changed.get(answer) or (train_on != "all" and rendered.refused.get(answer))
            if reason:
                raise RowError(reason)
    if train_on == "all":
        return [(0, len(rendered.text), 1.0)]
    found = list[Weighted]()
    for span in rendered.spans:
        if span.message not in asked:
            continue
        inside = [answer for answer in answers if span.since <= answer <= span.message]
        if len({weights[answer] if answer in asked else 0.0 for answer in inside}) > 1:
            raise RowError(
                f"the template marks messages {span.since + 1} to {span.message + 1} as one block of generation; they "
                f"cannot count differently"
            )
        if found and found[-1][1] == span.start and found[-1][2] == weights[span.message]:
            found[-1] = (found[-1][0], span.stop, found[-1][2])
        else:
            found.append((span.start, span.stop, weights[span.message]))
    return found


def _or_one(weight: float | None) -> float:
    return 1.0 if weight is None else weight


def token_weights(text: str, encoding: Encoding, spans: Sequence[Weighted]) -> NDArray[np.float64]:
    """The weight of each token, [tokens]: that of the span in which all its characters lie, else 0.

    Whitespace at the beginning of a token does not count: tokenizers put the space before a word into the word's
    token, and the space may stand before the span.
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
        # a token without characters, as a space that a tokenizer puts in, counts within a span and not at its border
        if first <= begins < stop <= last or first < start == stop < last:
            weights[i] = weight
    return weights


class UntrainedError(RowError):
    """A row that is well formed and of which no token counts in the loss."""


def require_trained(weights: NDArray[np.float64]) -> None:
    """UntrainedError where no token but the first, which nothing predicts, counts."""
    if not weights[1:].any():
        raise UntrainedError("no token of it is trained: its answers are empty or have weight 0")
