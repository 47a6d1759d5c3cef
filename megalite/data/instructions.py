"""Conversations as training data: rendered, tokenised and weighted, once, into indexed files."""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megalite.data.indexed import IndexedWriter, paths
from megalite.data.origin import describe_tokenizer
from megalite.data.report import Report
from megalite.text.chat import ChatTemplate, control_pattern
from megalite.text.controls import Controls, keep_text, unmark
from megalite.text.conversations import normalise, read_rows
from megalite.text.jinja import LimitError
from megalite.text.masks import UntrainedError, require_trained, token_weights, weighted_spans
from megalite.text.messages import Conversation
from megalite.text.tokenizer import Encoding, Tokenizer
from megalite.watch.progress import Bar

# Raised whenever the same rows would give other files, so that old caches are not taken for new ones.
RECIPE = 3
# within so many seconds a refusal of the same file is another rank's
SAME_RUN_S = 10.0


class Options(NamedTuple):
    """How rows become tokens; the keys of the same names in section data."""

    train_on: str = "assistant"
    control_tokens: str = "escape"
    bad_rows: str = "stop"


class Example(NamedTuple):
    """One conversation made ready: `weights` [tokens] of each token as a label."""

    where: str
    conversation: Conversation
    text: str
    encoding: Encoding
    weights: NDArray[np.float64]


def examples(
    path: str | Path, tokenizer: Tokenizer, template: ChatTemplate, options: Options, report: Report
) -> Iterator[Example]:
    """Every good row of a file, ready; a bad one is a ValueError with its place, or with bad_rows=skip counted.

    Rows without a trained token are left out and counted.
    """
    controls = control_pattern(tokenizer) if options.control_tokens != "allow" else None
    for row in read_rows(path):
        try:
            yield _example(row.where, row.value, tokenizer, template, options, report, controls)
        except LimitError:  # of the template, whatever the row
            raise
        except UntrainedError:
            report.see("untrained", row.where)
        except ValueError as error:  # of a row, or of a tokenizer that cannot cut its text
            if options.bad_rows == "stop":
                raise ValueError(f"{row.where}: {error} (data.bad_rows=skip leaves such rows out)") from None
            report.bad.append(f"{row.where}: {error}")


def _example(
    where: str,
    value: Any,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    options: Options,
    report: Report,
    controls: Controls | None,
) -> Example:
    given = normalise(value)
    conversation, found, changed = given, 0, 0
    if controls is not None and options.control_tokens == "escape":
        conversation, found, changed = keep_text(given, lambda c: template.render(c).text, tokenizer, controls)
    elif controls is not None:
        found = controls.escape(given, "", "", 0)[1]
    marked = template.render(conversation)
    there = unmark(marked.text)
    spans = [span._replace(start=there.at(span.start), stop=there.at(span.stop)) for span in marked.spans]
    rendered = replace(marked, text=there.text, spans=spans)
    encoding = tokenizer.encode_chat(rendered.text, there.ranges)
    weights = token_weights(rendered.text, encoding, weighted_spans(conversation, rendered, options.train_on))
    require_trained(weights.astype(np.float32))  # as training has them: the smallest become 0
    kept = conversation if changed else given
    report.look(where, kept, rendered.text, encoding, weights, tokenizer)
    report.controls += found
    told = {
        "controls": found,
        "changed": changed,
        "unshown": rendered.unshown,
        "dropped assistant": len(rendered.changed),
    }
    for what in (what for what, count in told.items() if count):
        report.see(what, where)
    return Example(where, kept, rendered.text, encoding, weights)


def weights_prefix(prefix: str | Path) -> Path:
    """Where the weights of the tokens of `prefix` are: as many numbers, each a place in the list of the sidecar."""
    return Path(f"{prefix}_weights")


def write_indexed(
    path: str | Path, prefix: Path, tokenizer: Tokenizer, template: ChatTemplate, options: Options
) -> Report:
    """Tokens and weights of every conversation of a file, as `prefix` and `prefix_weights`; all of it or nothing."""
    report, table = Report(), {0.0: 0}
    with ExitStack() as stack:
        # the tokens are closed last: where their index is, all is
        tokens = stack.enter_context(IndexedWriter(prefix, tokenizer.vocab_size))
        weights = stack.enter_context(IndexedWriter(weights_prefix(prefix), dtype="uint8"))
        bar, trained = stack.enter_context(Bar(f"reading {Path(path).name}", None)), 0
        for example in examples(path, tokenizer, template, options, report):
            for weight in np.unique(example.weights).tolist():
                if len(table) == 256 and weight not in table:
                    raise ValueError(f"{example.where}: more than 255 different weights in {path}; round them")
                table.setdefault(weight, len(table))
            tokens.add_document(example.encoding.ids)
            weights.add_document(np.array([table[w] for w in example.weights.tolist()], dtype=np.uint8))
            trained += int(np.count_nonzero(example.weights))
            bar.advance(1, f"{bar.done + 1} conversations")
        if not report.formats:
            rows, where = report.seen.get("untrained", (0, ""))
            if rows:
                raise ValueError(
                    f"{path}: no token is trained: the answers of {rows} rows are empty or have weight 0 (the first: "
                    f"{where})"
                )
            first = f", the first: {report.bad[0]}" if report.bad else ""
            raise ValueError(f"{path}: no conversation in it{first}")
        tokens.sidecar = {
            "documents": sum(report.formats.values()),
            "tokens": tokens.num_tokens,
            "trained_tokens": trained,
            **describe_tokenizer(tokenizer, prefix.parent),
            "weights": list(table),
            "template_name": template.name,
            "template": template.source,
            **options._asdict(),
            "report": report.to_sidecar(path),
            "sources": [Path(path).name],
        }
    return report


def prepare(path: str, cache_dir: str | Path, tokenizer: Tokenizer, template: ChatTemplate, options: Options) -> Path:
    """The prefix of the indexed files of a file of conversations, kept in `cache_dir`; the second call finds them.

    Safe to call from several processes at once: one makes them, the others wait.
    """
    digest = hashlib.sha256(repr((RECIPE, tokenizer.fingerprint, template.source, template.tokens, options)).encode())
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    folder = Path(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    prefix = folder / f"sft-{digest.hexdigest()[:16]}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not paths(prefix)[1].is_file():
            refused = folder / f"{prefix.name}.refused"
            _refuse_again(refused, path)
            try:
                write_indexed(path, prefix, tokenizer, template, options)
            except ValueError as error:
                refused.write_text(json.dumps([str(path), str(error)]), encoding="utf-8")
                raise
            refused.unlink(missing_ok=True)
    return prefix


def _refuse_again(refused: Path, path: str | Path) -> None:
    """The ValueError that another rank of this run has just met, without reading everything up to it once more.

    Else each would in turn, and the first to end would end the run before the one that speaks has found the mistake.
    """
    if refused.is_file() and time.time() - refused.stat().st_mtime < SAME_RUN_S:
        met, message = json.loads(refused.read_text("utf-8"))
        if met == str(path):
            raise ValueError(message)
