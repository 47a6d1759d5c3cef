"""The data of pretraining: windows of one stream of tokens, and of held-out streams."""

from __future__ import annotations

import bisect
import itertools
from pathlib import Path

from megalite.config import Config
from megalite.data.dataset import PretrainDataset, Samples, Section, heldout_windows
from megalite.data.indexed import IndexedDataset, paths
from megalite.data.native import open_indexed
from megalite.data.origin import find_tokenizer_of
from megalite.data.sets import DataSets, check_size, check_token_ids, check_tokenizer_file, explain
from megalite.text.tokenizer import load_tokenizer

# of a held-out set so many tokens are decoded to learn how many bytes of text they are: seconds
DECODED_TOKENS = 5_000_000


def open_stream(config: Config, scan: bool = True) -> DataSets:
    """Open and check data.path and its held-out sets, of a resolved configuration.

    scan: read small streams through for token ids that the model does not have, which one rank should do. Raises
    ValueError, with a remedy, for anything wrong with the data.
    """
    d, t = config.data, config.train
    check_tokenizer_file(config)
    if d.path is None:
        raise ValueError(
            "data.path is not set: what should the model learn from? Make data of a text, then name it:\n"
            "  python tools/preprocess_data.py --input corpus.jsonl --tokenizer-model tokenizer.model --append-eod "
            "--output-prefix data/corpus\n"
            "  torchrun --nproc_per_node 8 examples/pretrain_7b.py data.path=data/corpus_text_document"
        )
    whole = _open(d.path, "data.path", d.reader)
    if d.tokenizer is not None:
        check_size(load_tokenizer(d.tokenizer), config)
    if whole.num_tokens <= t.seq_len:
        raise ValueError(
            f"data.path={d.path}: the data has {whole.num_tokens} tokens, but one sample of train.seq_len={t.seq_len} "
            f"needs {t.seq_len + 1}; use more data or a smaller train.seq_len"
        )
    train = whole
    heldout: dict[str, IndexedDataset] = {
        name: _open(prefix, f"data.valid.{name}", d.reader) for name, prefix in d.valid.items()
    }
    if not heldout and d.valid_fraction > 0:
        train, held = _split(whole, config)
        heldout = {"valid": held}
    if train.num_tokens <= t.seq_len:
        raise ValueError(
            f"data.valid_fraction={d.valid_fraction} of {d.path} leaves {train.num_tokens} tokens to train on, but one "
            f"sample of train.seq_len={t.seq_len} needs {t.seq_len + 1}; hold out less, or use more data"
        )
    for data in {id(x): x for x in (whole, *heldout.values())}.values() if scan else ():
        check_token_ids(data, config)
    return DataSets(
        PretrainDataset(train, t.seq_len, t.seed, isolate_documents=d.isolate_documents),
        {n: _windows(n, x, config) for n, x in heldout.items()},
        {n: _bytes_per_token(x, d.tokenizer, scan) for n, x in heldout.items()},
        f"{Path(d.path).name}: {train.num_tokens} tokens in {train.num_documents} documents",
    )


def _split(whole: IndexedDataset, config: Config) -> tuple[Section, Section]:
    """The documents to train on and those to hold out, data.valid_fraction of the tokens from the end."""
    d, starts = config.data, whole.document_starts.tolist()
    cut = bisect.bisect_left(starts, whole.num_tokens * (1 - d.valid_fraction))
    if 0 < cut < whole.num_documents:
        return Section(whole, 0, cut), Section(whole, cut, whole.num_documents)
    raise ValueError(
        f"{d.path}: data.valid_fraction={d.valid_fraction} of {whole.num_documents} documents holds out none; "
        f"set data.valid_fraction=0, or hold out your own set with data.valid.NAME=PREFIX"
    )


def _windows(name: str, data: IndexedDataset, config: Config) -> Samples:
    d, key = config.data, f"data.valid.{name}"
    if not d.valid:
        key = f"data.valid_fraction={d.valid_fraction} of {d.path}"
    if data.num_tokens < 2:
        raise ValueError(f"{key}: holds out {data.num_tokens} tokens, and one prediction needs 2; hold out more")
    return heldout_windows(data, config.train.seq_len, isolate_documents=d.isolate_documents)


def _open(prefix: str, key: str, reader: str) -> IndexedDataset:
    if not paths(prefix)[1].is_file():
        explain(key, prefix)
    try:
        return open_indexed(prefix, reader)
    except ValueError as error:
        raise ValueError(f"{key}={prefix}: {error}") from None


def _bytes_per_token(data: IndexedDataset, tokenizer: str | None, scan: bool) -> float | None:
    """Bytes of text for each token that is predicted; None where the text is not known, or with `scan` false."""
    if isinstance(data, Section):
        return _decoded_bytes_per_token(data, tokenizer) if scan else None
    found = data.sidecar.get("text_bytes")
    # the first token of the stream is never predicted
    return found / max(1, data.num_tokens - 1) if isinstance(found, int) and found > 0 else None


def _decoded_bytes_per_token(data: Section, path: str | None) -> float | None:
    """By the text that the documents decode to: of all, or of a very large set those evenly spread over it.

    None where the tokenizer that the data was made with is not at hand.
    """
    found = path or find_tokenizer_of(data.whole.prefix)
    tokenizer = load_tokenizer(found) if found else None
    if tokenizer is None or tokenizer.fingerprint != data.whole.sidecar.get("tokenizer_sha256"):
        return None
    starts = [*data.document_starts.tolist(), data.num_tokens]
    every = -(-data.num_tokens // DECODED_TOKENS)
    size = tokens = 0
    for first, last in list(itertools.pairwise(starts))[::every]:
        size += len(tokenizer.decode(data.tokens(first, last).tolist()).encode())
        tokens += last - first
    # the first token of the stream is never predicted
    return size / max(1, tokens - (every == 1))
