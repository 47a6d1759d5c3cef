"""Opens sentencepiece models and Hugging Face tokenizer files; each library is imported only when used."""

from collections.abc import Sequence
from pathlib import Path

from megalite.text.encoding import Encoding, StreamDecoder, Tokenizer
from megalite.text.tokenizer_json import HuggingFaceTokenizer
from megalite.text.tokenizer_spm import SentencePieceTokenizer

__all__ = ["Encoding", "HuggingFaceTokenizer", "SentencePieceTokenizer", "StreamDecoder", "Tokenizer", "load_tokenizer"]


def load_tokenizer(path: str | Path, add: Sequence[str] = ()) -> Tokenizer:
    """Open a sentencepiece `.model` file, a `tokenizer.json`, or a folder that contains one of them.

    add: strings to add as control tokens (model.add_tokens).

    Raises ValueError if there is no such file or it cannot be used.
    """
    file = tokenizer_file(path)
    return HuggingFaceTokenizer(file, add) if file.suffix == ".json" else SentencePieceTokenizer(file, add)


def tokenizer_file(path: str | Path) -> Path:
    """Return the tokenizer file at `path`, a file or a folder. Raises ValueError if there is none, or several."""
    file = Path(path)
    if file.is_dir():
        found = [*file.glob("tokenizer.json"), *sorted(file.glob("*.model"))]
        if not found:
            raise ValueError(f"{file}: contains neither a tokenizer.json nor a .model file; name the tokenizer file")
        if len(found) > 2 or (len(found) == 2 and found[0].suffix != ".json"):
            names = ", ".join(each.name for each in found)
            raise ValueError(f"{file}: contains several tokenizers ({names}); name one of the files")
        file = found[0]
    if not file.is_file():
        raise ValueError(f"{file}: no such tokenizer; name a sentencepiece .model file or a tokenizer.json")
    return file
