"""Converts conversations to training data: renders, tokenizes and weights them once, into indexed files."""

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
from megalite.text.chat import ChatTemplate
from megalite.text.controls import Controls, controls_of, protect_controls, strip_marks
from megalite.text.conversations import normalise, read_rows
from megalite.text.jinja import LimitError
from megalite.text.masks import UntrainedError, require_trained, token_weights, weighted_spans
from megalite.text.messages import Conversation
from megalite.text.tokenizer import Encoding, Tokenizer
from megalite.watch.progress import Bar

# Increment when the same rows would produce other files, so that old caches are not reused.
RECIPE = 3
# an error recorded less than this many seconds ago comes from another rank of the same run
SAME_RUN_S = 10.0


class Options(NamedTuple):
    """How rows become tokens; see the config keys of the same names in section data."""

    train_on: str = "assistant"
    control_tokens: str = "escape"
    bad_rows: str = "stop"


class Example(NamedTuple):
    """One converted conversation; `weights` [tokens] is the loss weight of each token as a label."""

    where: str
    conversation: Conversation
    text: str
    encoding: Encoding
    weights: NDArray[np.float64]


def examples(
    path: str | Path, tokenizer: Tokenizer, template: ChatTemplate, options: Options, report: Report
) -> Iterator[Example]:
    """Yield the converted rows of a file. Rows without a trained token are skipped and counted in `report`.

    Raises ValueError with file and line at a bad row; with bad_rows=skip, bad rows are skipped and counted too.
    """
    controls = controls_of(tokenizer) if options.control_tokens != "allow" else None
    for row in read_rows(path):
        try:
            yield build_example(row.where, row.value, tokenizer, template, options, report, controls)
        except LimitError:  # the template is at fault, not the row
            raise
        except UntrainedError:
            report.count("untrained", row.where)
        except ValueError as error:  # a bad row, or text that the tokenizer fails on
            if options.bad_rows == "stop":
                raise ValueError(f"{row.where}: {error} (data.bad_rows=skip skips such rows)") from None
            report.bad.append(f"{row.where}: {error}")


def build_example(
    where: str,
    value: Any,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    options: Options,
    report: Report,
    controls: Controls | None,
) -> Example:
    """Convert one decoded row and record in `report` what was noticed. Raises ValueError if the row is bad.

    controls: the tokenizer's control strings, or None to let them become control tokens.
    """
    original = normalise(value)
    conversation, found, changed = original, 0, 0
    if controls is not None and options.control_tokens == "escape":
        conversation, found, changed = protect_controls(
            original, lambda c: template.render(c).text, tokenizer, controls
        )
    elif controls is not None:
        found = controls.escape(original, "", "", 0)[1]
    marked = template.render(conversation)
    stripped = strip_marks(marked.text)
    spans = [span._replace(start=stripped.at(span.start), stop=stripped.at(span.stop)) for span in marked.spans]
    rendered = replace(marked, text=stripped.text, spans=spans)
    encoding = tokenizer.encode_chat(rendered.text, stripped.ranges)
    weights = token_weights(rendered.text, encoding, weighted_spans(conversation, rendered, options.train_on))
    require_trained(weights.astype(np.float32))  # training uses float32, in which tiny weights are 0
    kept = conversation if changed else original
    report.inspect(where, kept, rendered.text, encoding, weights, tokenizer)
    report.controls += found
    counts = {
        "controls": found,
        "changed": changed,
        "unshown": rendered.unshown,
        "dropped assistant": len(rendered.changed),
    }
    for what in (what for what, count in counts.items() if count):
        report.count(what, where)
    return Example(where, kept, rendered.text, encoding, weights)


def weights_prefix(prefix: str | Path) -> Path:
    """The prefix of the weights of the tokens of `prefix`: one index per token into the sidecar's list `weights`."""
    return Path(f"{prefix}_weights")


def write_indexed(
    path: str | Path, prefix: Path, tokenizer: Tokenizer, template: ChatTemplate, options: Options
) -> Report:
    """Write tokens and weights of all conversations of a file to `prefix` and `prefix_weights`; all or nothing.

    Raises ValueError at a bad row (see `examples`), or if no conversation with a trained token is left.
    """
    report, table = Report(), {0.0: 0}
    with ExitStack() as stack:
        # the tokens are closed last, so that their index exists only if everything does
        tokens = stack.enter_context(IndexedWriter(prefix, tokenizer.vocab_size))
        weights = stack.enter_context(IndexedWriter(weights_prefix(prefix), dtype="uint8"))
        bar, trained = stack.enter_context(Bar(f"reading {Path(path).name}", None)), 0
        for example in examples(path, tokenizer, template, options, report):
            for weight in np.unique(example.weights).tolist():
                if len(table) == 256 and weight not in table:
                    raise ValueError(f"{example.where}: {path} has more than 255 different weights; round them")
                table.setdefault(weight, len(table))
            tokens.add_document(example.encoding.ids)
            weights.add_document(np.array([table[w] for w in example.weights.tolist()], dtype=np.uint8))
            trained += int(np.count_nonzero(example.weights))
            bar.advance(1, f"{bar.done + 1} conversations")
        if not report.formats:
            rows, where = report.seen.get("untrained", (0, ""))
            if rows:
                raise ValueError(
                    f"{path}: has no trained token: the answers of {rows} rows are empty or have weight 0 (the first: "
                    f"{where})"
                )
            first = f"; the first bad row: {report.bad[0]}" if report.bad else ""
            raise ValueError(f"{path}: has no valid conversation{first}")
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
    """Write the indexed files of a conversation file into `cache_dir` and return their prefix; later calls find them.

    Safe to call from several processes at once: one writes, the others wait. Raises ValueError as `write_indexed`.
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
            record = folder / f"{prefix.name}.refused"
            _raise_recorded(record, path)
            try:
                write_indexed(path, prefix, tokenizer, template, options)
            except ValueError as error:
                record.write_text(json.dumps([str(path), str(error)]), encoding="utf-8")
                raise
            record.unlink(missing_ok=True)
    return prefix


def _raise_recorded(record: Path, path: str | Path) -> None:
    """Raise the ValueError that another rank of this run has just recorded for the same file.

    Otherwise each rank would read the file up to the bad row in turn, and the first to exit would end the run before
    the rank that reports errors has found it.
    """
    if record.is_file() and time.time() - record.stat().st_mtime < SAME_RUN_S:
        recorded_path, message = json.loads(record.read_text("utf-8"))
        if recorded_path == str(path):
            raise ValueError(message)
