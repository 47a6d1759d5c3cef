"""What a file of conversations looks like to the model, before a run is spent on it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from megalite.data.chat import ChatTemplate
from megalite.data.instructions import Example, Report
from megalite.data.packing import pack, pieces
from megalite.data.tokenizer import Tokenizer

# what templates write where they mean a control token
CONTROL_LIKE = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜<>\s]+｜>|\[/?INST\]|</?s>")


@dataclass
class Survey:
    """Counts over all rows; `dropped` by role, messages whose content is not in the rendered text."""

    lengths: list[int] = field(default_factory=list)
    trained: int = 0
    endless: int = 0
    double_bos: int = 0
    untrained: int = 0
    tools: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)


def survey(examples: Iterable[Example], tokenizer: Tokenizer, template: ChatTemplate, seq_len: int) -> Survey:
    """Count what `warnings` and `histogram` tell of."""
    found, controls = Survey(), set(tokenizer.controls.values())
    for example in examples:
        ids, weights = np.array(example.encoding.ids), example.weights
        found.lengths.append(len(ids))
        found.trained += int(np.count_nonzero(weights))
        last = int(np.flatnonzero(weights)[-1])
        found.endless += int(ids[last]) not in controls
        bos = ids == tokenizer.bos_id
        found.double_bos += bool((bos[:-1] & bos[1:]).any())
        found.untrained += not weights[1 : seq_len + 1].any()
        names = (str(tool.get("function", tool).get("name")) for tool in example.conversation.tools or [])
        found.tools += not all(name in example.text for name in names)
        for message in example.conversation.messages:
            if message["content"].strip() and message["content"].strip() not in example.text:
                found.dropped[message["role"]] += 1
    for written in set(CONTROL_LIKE.findall(template.source)) - tokenizer.controls.keys():
        found.unknown[written] += 1
    return found


def warnings(found: Survey, report: Report, tokenizer: Tokenizer, seq_len: int, control_tokens: str) -> Iterator[str]:
    """One line about each thing that is probably not meant."""
    yield from report.lines(control_tokens)
    for role, count in sorted(found.dropped.items()):
        yield f"the template drops or changes {count} messages of role {role}"
    if found.tools:
        yield f"the template does not show the tools of {found.tools} rows; qwen does"
    if found.unknown:
        names = ", ".join(sorted(found.unknown))
        yield f"the template writes {names}: no control token of this tokenizer, so ordinary text to the model"
    if found.endless:
        yield f"{found.endless} rows end their last answer without a control token: the model does not learn to stop"
    if found.double_bos:
        yield f"{found.double_bos} rows have the beginning-of-sequence token twice in a row"
    if tokenizer.pad_id is not None and tokenizer.pad_id == tokenizer.eos_id:
        yield "pad and end-of-sequence are one token: harmless here, where masks go by position and not by token"
    if longer := sum(length > seq_len + 1 for length in found.lengths):
        yield f"{longer} rows are longer than train.seq_len={seq_len} and will be cut (data.overlong)"
    if found.untrained:
        yield f"{found.untrained} rows have no trained token left when cut at their end"


def histogram(lengths: list[int], width: int = 40) -> Iterator[str]:
    """Rows by their number of tokens, in powers of two."""
    bins = Counter((length - 1).bit_length() for length in lengths)
    most = max(bins.values())
    for power in range(min(bins), max(bins) + 1):
        low, high = (1 << (power - 1)) + 1 if power else 1, 1 << power
        bar = "#" * -(-bins[power] * width // most)
        yield f"{low:>7}-{high:<7} {bins[power]:>7} {bar}"


def efficiency(lengths: list[int], seq_len: int) -> tuple[int, float]:
    """Rows of `seq_len` that the conversations pack into, and the share of their positions that is filled."""
    parts, _ = pieces([0] * len(lengths), lengths, seq_len, "truncate_right")
    each = np.array([part.length for part in parts], dtype=np.int64)
    rows = len(pack(each, seq_len))
    return rows, float(each.sum() / (rows * seq_len))


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
