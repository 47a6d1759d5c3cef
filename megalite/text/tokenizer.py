"""One face for sentencepiece models and Hugging Face tokenizer files; each library is loaded only when used."""

from collections.abc import Sequence
from pathlib import Path

from megalite.text.encoding import Encoding, StreamDecoder, Tokenizer
from megalite.text.tokenizer_json import HuggingFaceTokenizer
from megalite.text.tokenizer_spm import SentencePieceTokenizer

__all__ = ["Encoding", "HuggingFaceTokenizer", "SentencePieceTokenizer", "StreamDecoder", "Tokenizer", "load_tokenizer"]


def load_tokenizer(path: str | Path, add: Sequence[str] = ()) -> Tokenizer:
    """Opens a sentencepiece `.model` file, a `tokenizer.json`, or a folder that holds one of them.

    `add`: strings that become control tokens of it, as model.add_tokens.
    """
    file = tokenizer_file(path)
    return HuggingFaceTokenizer(file, add) if file.suffix == ".json" else SentencePieceTokenizer(file, add)


def tokenizer_file(path: str | Path) -> Path:
    """The file that `path`, a tokenizer file or a folder with one, stands for; ValueError where there is none."""
    file = Path(path)
    if file.is_dir():
        found = [*file.glob("tokenizer.json"), *sorted(file.glob("*.model"))]
        if not found:
            raise ValueError(f"{file}: holds neither a tokenizer.json nor a .model file; give the file itself")
        if len(found) > 2 or (len(found) == 2 and found[0].suffix != ".json"):
            names = ", ".join(each.name for each in found)
            raise ValueError(f"{file}: holds several tokenizers ({names}); give the file itself")
        file = found[0]
    if not file.is_file():
        raise ValueError(f"{file}: no such tokenizer; give a sentencepiece .model file or a tokenizer.json")
    return file
