"""What a file of conversations looks like to the model at one train.seq_len, before a run is spent on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megalite.data.instructions import Example
from megalite.data.packing import Conversations, kept_part
from megalite.data.report import from_sidecar, place

CUT = {"drop": "left out", "truncate_right": "cut at their end", "truncate_left": "cut at their beginning"}


@dataclass(frozen=True)
class Survey:
    """Conversations of the file `path` when those longer than a row are cut or left out.

    `chosen`: the numbers of all but those of which the cut leaves no trained token, `untrained`. `tokens` and `trained`
    count what rows will hold of them.
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
        side, report = self.data.sidecar, from_sidecar(self.data.sidecar["report"], self.path)
        formats = ", ".join(f"{count} {name}" for name, count in report.formats.items())
        share = 100 * self.trained / max(1, self.tokens)
        return f"{formats} rows, template {side['template_name']}, {share:.1f} % of {self.tokens} tokens trained"

    def notes(self) -> Iterator[str]:
        """One line about each thing that is probably not meant."""
        report = from_sidecar(self.data.sidecar["report"], self.path)
        yield from report.lines(self.data.sidecar["control_tokens"])
        where = f"train.seq_len={self.seq_len}"
        if n := len(self.longer):
            first = place(report, int(self.longer[0]), self.path)
            done = f"{CUT[self.overlong]} (data.overlong={self.overlong})"
            yield f"{_are(n)} longer than {where} and {done} (the first: {first})"
        if n := len(self.untrained):
            first = place(report, int(self.untrained[0]), self.path)
            yield f"{_are(n)} left out, with no trained token within {where} (the first: {first})"

    def require_some(self, key: str) -> None:
        """ValueError where the file holds nothing that a run can learn from, or a template that cannot work."""
        report = from_sidecar(self.data.sidecar["report"], self.path)
        # some models write such strings as ordinary text on purpose, and end a turn with a token that they have
        if report.unknown and "endless" in report.seen:
            names = ", ".join(report.unknown)
            _, first = report.seen[f"unknown {report.unknown[0]}"]
            raise ValueError(
                f"{key}: template {self.data.sidecar['template_name']} writes {names} (the first in {first}), and the "
                f"tokenizer has no such token, so that the model cannot learn where a turn ends; add them with "
                f"model.add_tokens='[{names}]', or choose a template for this tokenizer with data.template"
            )
        if len(self.chosen) == (len(self.longer) if self.overlong == "drop" else 0):
            (*_, last) = self.notes()
            remedy = "" if self.overlong == "truncate_left" else ", or keep the end with data.overlong=truncate_left"
            raise ValueError(f"{key}: no row is left in which a token is trained: {last}; raise train.seq_len{remedy}")


def survey(data: Conversations, path: str, seq_len: int, overlong: str) -> Survey:
    """Look at conversations with rows of `seq_len`; only those that are cut are read."""
    longer = np.flatnonzero(data.lengths - 1 > seq_len)
    tokens, trained = int(data.sidecar["tokens"]), int(data.sidecar["trained_tokens"])
    untrained = []
    for number in longer.tolist():
        weights = data.weigh(data.weights[number])
        part = kept_part(len(weights), seq_len, overlong)
        learned = int(np.count_nonzero(weights[part]))
        # the first token of what is kept is predicted by nothing
        if not weights[part][1:].any():
            learned = 0
            untrained.append(number)
        tokens -= len(weights) - (len(weights[part]) if learned else 0)
        trained -= int(np.count_nonzero(weights)) - learned
    gone = np.array([] if overlong == "drop" else untrained, dtype=np.int64)
    chosen = np.setdiff1d(np.arange(len(data.lengths)), gone)
    return Survey(data, path, seq_len, overlong, chosen, longer, gone, tokens, trained)


def _are(count: int) -> str:
    return "1 conversation is" if count == 1 else f"{count} conversations are"


def shown_path(data: Conversations, path: str) -> str:
    """The file that conversations were made of, as far as it is known."""
    sources = data.sidecar["sources"]
    return path if Path(path).is_file() or not sources else str(sources[0])


def histogram(lengths: list[int], width: int = 40) -> Iterator[str]:
    """Rows by their number of tokens, in powers of two."""
    bins = Counter((length - 1).bit_length() for length in lengths)
    most = max(bins.values())
    for power in range(min(bins), max(bins) + 1):
        low, high = (1 << (power - 1)) + 1 if power else 1, 1 << power
        bar = "#" * -(-bins[power] * width // most)
        yield f"{low:>7}-{high:<7} {bins[power]:>7} {bar}"


def marked(example: Example, before: str, after: str) -> str:
    """The rendered text with `before` and `after` around what is trained; unprintable characters as escapes."""
    text, spans = example.text, list[list[int]]()
    for (start, stop), weight in zip(example.encoding.spans, example.weights):
        if weight and spans and spans[-1][1] >= start:
            spans[-1][1] = stop
        elif weight:
            spans.append([start, stop])
    out, at = "", 0
    for start, stop in spans:
        out += _plain(text[at:start]) + before + _plain(text[start:stop]) + after
        at = stop
    return out + _plain(text[at:])


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\u200d" else c.encode("unicode_escape").decode() for c in text)
