"""What the conversion of instruction data noticed about its rows; training and tools/data.py print the same lines."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalite.text.messages import Conversation
from megalite.text.tokenizer import Encoding, Tokenizer

SHOWN_ROWS = 5
# strings that templates write as control tokens; not [INST], which is ordinary text to Llama 2 and Mistral
CONTROL_LIKE = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜<>\s]+｜>|</?s>|<(?:bos|eos|start_of_turn|end_of_turn)>")
NOTES = {
    "changed": "the template reads messages, so control strings in them were broken up with a zero-width space",
    "controls": "{which} control strings inside messages were {done}",
    "double_bos": "the beginning-of-sequence token appears twice in a row",
    "dropped": "the template drops or changes messages of role {which}",
    "endless": "the last answer ends without a control token, so the model does not learn to stop",
    "tools": "the template does not show the tools",
    "unshown": "the template does not show the reasoning of messages, so it is not trained",
    "untrained": "skipped rows without a trained token, whose answers are empty or have weight 0",
    "unknown": "the template writes {which}, which is not a token of this tokenizer",
}


@dataclass
class Report:
    """Counts over the rows of a file.

    `formats`: rows by format. `bad`: errors of skipped rows. `controls`: control strings in messages. `seen`: for each
    key of NOTES, the number of rows and the first of them. `places`: (number of a conversation, its line in the file),
    with an entry only where lines are not consecutive. `form`: the separator of file and line.
    """

    formats: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    controls: int = 0
    seen: dict[str, tuple[int, str]] = field(default_factory=dict)
    places: list[tuple[int, int]] = field(default_factory=list)
    form: str = ":"

    def count(self, what: str, where: str) -> None:
        """Count the row at `where` under a key of NOTES."""
        rows, first = self.seen.get(what, (0, where))
        self.seen[what] = rows + 1, first

    def inspect(
        self, where: str, conversation: Conversation, text: str, encoding: Encoding, weights: NDArray[Any], t: Tokenizer
    ) -> None:
        """Record one good row, rendered as `text`, and what is unusual about it. weights: [tokens], some above 0."""
        before = where.rstrip("0123456789")
        number, line = self.formats.total(), int(where[len(before) :] or 0)
        self.form = ":row " if before.endswith(":row ") else ":"
        if not self.places or line - number != self.places[-1][1] - self.places[-1][0]:
            self.places.append((number, line))
        self.formats[conversation.format] += 1
        ids = np.array(encoding.ids)
        if int(ids[np.flatnonzero(weights)[-1]]) not in t.controls.values():
            self.count("endless", where)
        bos = ids == t.bos_id
        if (bos[:-1] & bos[1:]).any():
            self.count("double_bos", where)
        names = (str(tool.get("function", tool).get("name")) for tool in conversation.tools or [])
        if not all(name in text for name in names):
            self.count("tools", where)
        for written in _unknown(text, conversation, encoding, t):
            self.count(f"unknown {written}", where)

    @property
    def unknown(self) -> list[str]:
        """The template's control strings that are not tokens."""
        return sorted(what.removeprefix("unknown ") for what in self.seen if what.startswith("unknown "))

    def lines(self, control_tokens: str) -> Iterator[str]:
        """Yield one line for the user per note. control_tokens: the option's value when the data was made."""
        if self.bad:
            shown = "; ".join(self.bad[:SHOWN_ROWS])
            yield f"skipped {_rows(len(self.bad), 'bad ')} (data.bad_rows=skip): {shown}"
        done = "encoded as ordinary text" if control_tokens == "escape" else "left as control tokens"
        for what, (count, first) in sorted(self.seen.items()):
            kind, _, which = what.partition(" ")
            text = NOTES[kind].format(which=which or self.controls, done=done)
            yield f"{text}: {_rows(count)} (the first: {first})"

    def to_sidecar(self, path: str | Path) -> dict[str, Any]:
        """Return the report as JSON. Places omit the file name, because a cached file may have another name later."""
        return {
            "formats": dict(self.formats),
            "bad": [line.removeprefix(str(path)) for line in self.bad],
            "controls": self.controls,
            "seen": {what: [rows, first.removeprefix(str(path))] for what, (rows, first) in self.seen.items()},
            "places": self.places,
            "form": self.form,
        }


def from_sidecar(values: Mapping[str, Any], path: str) -> Report:
    """Restore a report from `to_sidecar` for the file that is now at `path`. Raises ValueError if it is damaged."""
    try:
        return Report(
            Counter(values["formats"]),
            [path + line for line in values["bad"]],
            values["controls"],
            {what: (rows, path + first) for what, (rows, first) in values["seen"].items()},
            [(number, line) for number, line in values["places"]],
            values["form"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the report on {path} in its sidecar is damaged ({error}); make the data again") from None


def locate(report: Report, number: int, path: str) -> str:
    """Return file:line of conversation `number`, counted from 0."""
    if not report.places:
        return f"{path}, conversation {number + 1}"
    first, line = report.places[bisect_right(report.places, number, key=lambda each: each[0]) - 1]
    return f"{path}{report.form}{line + number - first}"


def _rows(count: int, kind: str = "") -> str:
    return f"{count} {kind}row{'s' * (count != 1)}"


def _unknown(text: str, conversation: Conversation, encoding: Encoding, tokenizer: Tokenizer) -> set[str]:
    """Control strings in `text` that the template, not a message, wrote and that the tokenizer splits."""
    written = {each[0]: each.span() for each in CONTROL_LIKE.finditer(text) if each[0] not in tokenizer.controls}
    if not written:
        return set()
    typed = json.dumps([conversation.messages, conversation.tools], ensure_ascii=False)
    starts = [start for start, _ in encoding.spans]
    found = set()
    for name, (start, stop) in written.items():
        token = bisect_right(starts, start) - 1
        whole = token >= 0 and encoding.spans[token][1] >= stop
        if not whole and name not in typed:
            found.add(name)
    return found
