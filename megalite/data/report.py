"""What is noticed about rows of instruction data, told in the same words by training and by tools/data.py."""

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
# what templates write where they mean a control token; [INST] is ordinary text to the models that began with it
CONTROL_LIKE = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜<>\s]+｜>|</?s>|<(?:bos|eos|start_of_turn|end_of_turn)>")
TOLD = {
    "changed": "the template looks into messages, so that control strings in them got a zero-width space",
    "controls": "{which} control strings inside messages were {done}",
    "double_bos": "the beginning-of-sequence token stands twice side by side",
    "dropped": "the template drops or changes messages of role {which}",
    "endless": "the last answer ends without a control token, so that the model does not learn to stop",
    "tools": "the template does not show the tools",
    "unshown": "the template does not show the reasoning of messages, so it is not trained",
    "untrained": "no token is trained, since the answers are empty or have weight 0; left out",
    "unknown": "the template writes {which}, which is no token of this tokenizer",
}


@dataclass
class Report:
    """Counts over the rows of a file, and by `seen` how many rows each thing was noticed in, and the first of them.

    `places`: (number of a conversation, its line in the file) wherever lines do not follow each other. `form`: what
    stands between file and line.
    """

    formats: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    controls: int = 0
    seen: dict[str, tuple[int, str]] = field(default_factory=dict)
    places: list[tuple[int, int]] = field(default_factory=list)
    form: str = ":"

    def see(self, what: str, where: str) -> None:
        rows, first = self.seen.get(what, (0, where))
        self.seen[what] = rows + 1, first

    def look(
        self, where: str, conversation: Conversation, text: str, encoding: Encoding, weights: NDArray[Any], t: Tokenizer
    ) -> None:
        """Notice what is worth telling about one good row, rendered as `text`."""
        before = where.rstrip("0123456789")
        number, line = self.formats.total(), int(where[len(before) :] or 0)
        self.form = ":row " if before.endswith(":row ") else ":"
        if not self.places or line - number != self.places[-1][1] - self.places[-1][0]:
            self.places.append((number, line))
        self.formats[conversation.format] += 1
        ids = np.array(encoding.ids)
        if int(ids[np.flatnonzero(weights)[-1]]) not in t.controls.values():
            self.see("endless", where)
        bos = ids == t.bos_id
        if (bos[:-1] & bos[1:]).any():
            self.see("double_bos", where)
        names = (str(tool.get("function", tool).get("name")) for tool in conversation.tools or [])
        if not all(name in text for name in names):
            self.see("tools", where)
        for written in _unknown(text, conversation, encoding, t):
            self.see(f"unknown {written}", where)

    @property
    def unknown(self) -> list[str]:
        """Control strings of the template that are no tokens."""
        return sorted(what.removeprefix("unknown ") for what in self.seen if what.startswith("unknown "))

    def lines(self, control_tokens: str) -> Iterator[str]:
        """One line for the user about each thing that is worth one."""
        if self.bad:
            shown = "; ".join(self.bad[:SHOWN_ROWS])
            yield f"skipped {_rows(len(self.bad), 'bad ')} (data.bad_rows=skip): {shown}"
        done = "made ordinary text" if control_tokens == "escape" else "left as control tokens"
        for what, (count, first) in sorted(self.seen.items()):
            kind, _, which = what.partition(" ")
            text = TOLD[kind].format(which=which or self.controls, done=done)
            yield f"{text}: {_rows(count)} (the first: {first})"

    def to_sidecar(self, path: str | Path) -> dict[str, Any]:
        """As JSON, with places that do not say which file they are in: a cache may be met under another name."""
        return {
            "formats": dict(self.formats),
            "bad": [line.removeprefix(str(path)) for line in self.bad],
            "controls": self.controls,
            "seen": {what: [rows, first.removeprefix(str(path))] for what, (rows, first) in self.seen.items()},
            "places": self.places,
            "form": self.form,
        }


def from_sidecar(kept: Mapping[str, Any], path: str) -> Report:
    """The report that `to_sidecar` made, of the file that is called `path` now."""
    try:
        return Report(
            Counter(kept["formats"]),
            [path + line for line in kept["bad"]],
            kept["controls"],
            {what: (rows, path + first) for what, (rows, first) in kept["seen"].items()},
            [(number, line) for number, line in kept["places"]],
            kept["form"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the report on {path} in its sidecar is damaged ({error}); make the data again") from None


def place(report: Report, number: int, path: str) -> str:
    """file:line of conversation `number`."""
    if not report.places:
        return f"{path}, conversation {number + 1}"
    first, line = report.places[bisect_right(report.places, number, key=lambda each: each[0]) - 1]
    return f"{path}{report.form}{line + number - first}"


def _rows(count: int, kind: str = "") -> str:
    return f"{count} {kind}row{'s' * (count != 1)}"


def _unknown(text: str, conversation: Conversation, encoding: Encoding, tokenizer: Tokenizer) -> set[str]:
    """What the template has written into `text` as a control string and the tokenizer takes to pieces."""
    written = {each[0]: each.span() for each in CONTROL_LIKE.finditer(text) if each[0] not in tokenizer.controls}
    if not written:
        return set()
    said = json.dumps([conversation.messages, conversation.tools], ensure_ascii=False)
    starts = [start for start, _ in encoding.spans]
    found = set()
    for name, (start, stop) in written.items():
        token = bisect_right(starts, start) - 1
        whole = token >= 0 and encoding.spans[token][1] >= stop
        if not whole and name not in said:
            found.add(name)
    return found
