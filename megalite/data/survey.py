"""Surveys conversations at one train.seq_len: what is cut, left out and trained, before a run is spent on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megalite.data.instructions import Example
from megalite.data.packing import Conversations, kept_part
from megalite.data.report import from_sidecar, locate

CUT = {"drop": "left out", "truncate_right": "cut at the end", "truncate_left": "cut at the beginning"}


@dataclass(frozen=True)
class Survey:
    """The conversations of the file `path`, with those longer than a row cut or left out.

    `longer`: the numbers of conversations longer than a row. `untrained`: the numbers of those that have no trained
    token left after the cut; `chosen`: the numbers of all others. `tokens` and `trained`: the tokens in the rows, and
    the trained ones among them.
    """

    data: Conversations
    path: str
    seq_len: int
    overlong: str
    chosen: NDArray[np.int64]
    longer: NDArray[np.int64]
    untrained: NDArray[np.int64]
    tokens: int
    trained: int

    def summary(self) -> str:
        """Return one line: rows by format, template, and the share of trained tokens."""
        sidecar, report = self.data.sidecar, from_sidecar(self.data.sidecar["report"], self.path)
        formats = ", ".join(f"{count} {name}" for name, count in report.formats.items())
        share = 100 * self.trained / max(1, self.tokens)
        return f"{formats} rows, template {sidecar['template_name']}, {share:.1f} % of {self.tokens} tokens trained"

    def notes(self) -> Iterator[str]:
        """Yield one line about each finding that is probably unintended."""
        report = from_sidecar(self.data.sidecar["report"], self.path)
        yield from report.lines(self.data.sidecar["control_tokens"])
        where = f"train.seq_len={self.seq_len}"
        if n := len(self.longer):
            first = locate(report, int(self.longer[0]), self.path)
            done = f"{CUT[self.overlong]} (data.overlong={self.overlong})"
            yield f"{_are(n)} longer than {where} and {done} (the first: {first})"
        if n := len(self.untrained):
            first = locate(report, int(self.untrained[0]), self.path)
            yield f"{_are(n)} left out, with no trained token within {where} (the first: {first})"

    def require_some(self, key: str) -> None:
        """Raise ValueError if nothing is left to train on, or if the template's control strings are not tokens.

        key: the config key and value to name in the message.
        """
        report = from_sidecar(self.data.sidecar["report"], self.path)
        # some models write such strings as ordinary text on purpose, but end a turn with a token
        if report.unknown and "endless" in report.seen:
            names = ", ".join(report.unknown)
            _, first = report.seen[f"unknown {report.unknown[0]}"]
            raise ValueError(
                f"{key}: template {self.data.sidecar['template_name']} writes {names} (the first in {first}), which "
                f"are not tokens of the tokenizer, so the model cannot learn where a turn ends; add them with "
                f"model.add_tokens='[{names}]', or choose a template for this tokenizer with data.template"
            )
        if len(self.chosen) == (len(self.longer) if self.overlong == "drop" else 0):
            (*_, last) = self.notes()
            remedy = "" if self.overlong == "truncate_left" else ", or keep the end with data.overlong=truncate_left"
            raise ValueError(f"{key}: no row with a trained token is left: {last}; increase train.seq_len{remedy}")


def survey(data: Conversations, path: str, seq_len: int, overlong: str) -> Survey:
    """Survey conversations for rows of `seq_len` tokens. Reads only conversations that are cut."""
    longer = np.flatnonzero(data.lengths - 1 > seq_len)
    tokens, trained = int(data.sidecar["tokens"]), int(data.sidecar["trained_tokens"])
    untrained = []
    for number in longer.tolist():
        weights = data.weigh(data.weights[number])
        part = kept_part(len(weights), seq_len, overlong)
        learned = int(np.count_nonzero(weights[part]))
        # the first token that is kept is never predicted
        if not weights[part][1:].any():
            learned = 0
            untrained.append(number)
        tokens -= len(weights) - (len(weights[part]) if learned else 0)
        trained -= int(np.count_nonzero(weights)) - learned
    excluded = np.array([] if overlong == "drop" else untrained, dtype=np.int64)
    chosen = np.setdiff1d(np.arange(len(data.lengths)), excluded)
    return Survey(data, path, seq_len, overlong, chosen, longer, excluded, tokens, trained)


def _are(count: int) -> str:
    return "1 conversation is" if count == 1 else f"{count} conversations are"


def shown_path(data: Conversations, path: str) -> str:
    """Return `path` if it is a file, else the name of the file that the conversations were made from."""
    sources = data.sidecar["sources"]
    return path if Path(path).is_file() or not sources else str(sources[0])


def histogram(lengths: list[int], width: int = 40) -> Iterator[str]:
    """Yield lines of a histogram of `lengths` in powers of two; the longest bar has `width` characters."""
    bins = Counter((length - 1).bit_length() for length in lengths)
    most = max(bins.values())
    for power in range(min(bins), max(bins) + 1):
        low, high = (1 << (power - 1)) + 1 if power else 1, 1 << power
        bar = "#" * -(-bins[power] * width // most)
        yield f"{low:>7}-{high:<7} {bins[power]:>7} {bar}"


def mark_trained(example: Example, before: str, after: str) -> str:
    """Return the rendered text with `before` and `after` around trained parts and escapes of unprintable characters."""
    text, spans = example.text, list[list[int]]()
    for (start, stop), weight in zip(example.encoding.spans, example.weights):
        if weight and spans and spans[-1][1] >= start:
            spans[-1][1] = stop
        elif weight:
            spans.append([start, stop])
    out, at = "", 0
    for start, stop in spans:
        out += _escape(text[at:start]) + before + _escape(text[start:stop]) + after
        at = stop
    return out + _escape(text[at:])


def _escape(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\u200d" else c.encode("unicode_escape").decode() for c in text)
