"""What the preset tiny learns from by default: the committed corpus, or questions about it, prepared once. No torch."""

from __future__ import annotations

import dataclasses
import fcntl
from pathlib import Path

from megalite.config import DataConfig
from megalite.data.corpus import prepare
from megalite.data.questions import prepare_questions


def demo_data(data: DataConfig, corpus: Path, vocab_size: int, tuning: bool) -> DataConfig:
    """`data` with the text in the folder `corpus` as training and held-out sets, or with `tuning` questions about it.

    All ranks may call this at once: the first prepares the files in data.cache_dir, the others find them.
    Raises ValueError if the corpus is missing or the tokenizer cannot have `vocab_size` tokens.
    """
    cache = Path(data.cache_dir)
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = prepare(corpus, cache, vocab_size)
        questions = prepare_questions(corpus, cache) if tuning else None
    tokenizer = str(found.tokenizer)
    if questions is not None:
        template = data.template or "plain"
        return dataclasses.replace(data, sft=str(questions.train), tokenizer=tokenizer, template=template)
    valid = data.valid or {name: str(prefix) for name, prefix in found.heldout.items()}
    return dataclasses.replace(data, path=str(found.train), valid=valid, tokenizer=tokenizer)
