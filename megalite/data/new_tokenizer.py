"""Trains a tokenizer on text files and writes it to a folder that every command and AutoTokenizer can open."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megalite.data.corpus import build_once, train_tokenizer
from megalite.data.documents import read_documents, texts
from megalite.text.chat import BUILT_IN
from megalite.text.tokenizer import Tokenizer, load_tokenizer
from megalite.text.tokenizer_files import CONFIG, TEMPLATE

# the control tokens of the template chatml
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
END = "<|endoftext|>"
BYTES = 256


def new_tokenizer(
    files: Sequence[str | Path],
    target: Path,
    vocab_size: int,
    kind: str = "sentencepiece",
    chat: bool = False,
    keys: Sequence[str] = ("text",),
) -> Tokenizer:
    """Train a tokenizer on .jsonl (the texts of `keys`) or .txt files and write it to the new folder `target`.

    kind: `sentencepiece`, byte pairs with bytes for rare characters; or `bpe`, byte-level as in GPT-2, as a
    tokenizer.json. chat: add the tokens of the chatml template, and the template.

    Raises ValueError if `target` exists or the text is too small for the vocabulary.
    """
    if target.exists():
        raise ValueError(f"{target} exists; choose another --output")
    reserved = BYTES + 3 + len(CHAT_TOKENS) * chat
    if vocab_size <= reserved:
        raise ValueError(
            f"--vocab-size {vocab_size} must be above {reserved}, the number of bytes and control tokens; increase it"
        )
    controls = CHAT_TOKENS if chat else ()

    def build(folder: Path) -> None:
        if kind == "sentencepiece":
            model = train_tokenizer(_lines(files, keys), vocab_size, coverage=0.9995, controls=controls)
            (folder / "tokenizer.model").write_bytes(model)
        else:
            _train_bpe(_documents(files, keys), folder, vocab_size, controls)
        if chat:
            shutil.copyfile(BUILT_IN / "chatml.jinja", folder / TEMPLATE)

    build_once(target, build)
    return load_tokenizer(target)


def _documents(files: Sequence[str | Path], keys: Sequence[str]) -> Iterator[str]:
    found = False
    for document in read_documents(files):
        for text in texts(document, keys if document.is_json else keys[:1]):
            found = found or bool(text.strip())
            yield text
    if not found:
        raise ValueError(f"{', '.join(map(str, files))}: no document with any text; check the input")


def _lines(files: Sequence[str | Path], keys: Sequence[str]) -> Iterator[str]:
    for text in _documents(files, keys):
        yield from filter(None, text.split("\n"))


def _train_bpe(documents: Iterable[str], folder: Path, vocab_size: int, controls: Sequence[str]) -> None:
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ValueError("--type bpe needs the tokenizers package; pip install tokenizers") from error
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, *controls],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(documents, trainer)
    if made.get_vocab_size() < vocab_size:
        raise ValueError(
            f"the text is enough for {made.get_vocab_size()} pieces, not {vocab_size}; use more text or a smaller "
            f"--vocab-size"
        )
    made.save(str(folder / "tokenizer.json"))
    names: dict[str, str | bool] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    names["clean_up_tokenization_spaces"] = False
    (folder / CONFIG).write_text(json.dumps(names, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
