"""One face for sentencepiece models and Hugging Face tokenizer files; each library is loaded only when used."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

# Names under which models without a tokenizer_config.json keep their special tokens.
USUAL_EOS = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "[EOS]")
USUAL_BOS = ("<s>", "<bos>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "[BOS]")
USUAL_PAD = ("<pad>", "[PAD]", "<|pad|>")

# Serialized protobuf messages merge when joined: this one says normalizer_spec { add_dummy_prefix: false }.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Encoding(NamedTuple):
    """Ids, and the characters [start, stop) that each stands for; the bytes of one character share its range."""

    ids: list[int]
    spans: list[tuple[int, int]]


class Tokenizer(ABC):
    """Text to token ids and back; never adds special tokens by itself.

    `vocab_size` is one more than the largest id; `eos_id`, `bos_id`, `pad_id` are None where absent.
    """

    path: Path
    vocab_size: int
    eos_id: int | None
    bos_id: int | None
    pad_id: int | None
    # control tokens by the string that stands for them in a rendered chat
    controls: dict[str, int]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""

    @abstractmethod
    def encode_chat(self, text: str) -> Encoding:
        """The ids of a rendered chat with their characters: control strings in it, as `</s>`, are control tokens.

        Behind a control string sentencepiece puts no space of its own: a template writes the one it wants.
        """

    def control_string(self, token: int | None) -> str | None:
        """The string that stands for a control token."""
        return next((text for text, found in self.controls.items() if found == token), None)

    @property
    @abstractmethod
    def prefix(self) -> tuple[int, ...]:
        """What a Hugging Face folder has its own library put before every text, as <s>; `encode` does not."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        known = list(ids)
        for token in known:
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token {token} is not in 0..{self.vocab_size - 1} of {self.path}; "
                    f"decode with the tokenizer the model was trained with"
                )
        return self._decode(known)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer file, hexadecimal."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def _read_config(path: Path) -> dict[str, Any]:
    """The tokenizer_config.json beside a tokenizer file; {} where there is none."""
    beside = path.with_name("tokenizer_config.json")
    config: dict[str, Any] = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
    return config


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model` file."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.path = path
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes() + NO_DUMMY_PREFIX)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path}: not a sentencepiece model; give a .model file or tokenizer.json") from error
        self.vocab_size = self._processor.vocab_size()
        self.eos_id, self.bos_id, self.pad_id = (
            token if token >= 0 else None
            for token in (self._processor.eos_id(), self._processor.bos_id(), self._processor.pad_id())
        )
        ids = range(self.vocab_size)
        self.controls = {self._processor.id_to_piece(i): i for i in ids if self._processor.is_control(i)}

    def encode(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    @property
    def prefix(self) -> tuple[int, ...]:
        adds = _read_config(self.path).get("add_bos_token", True)
        return (self.bos_id,) if adds and self.bos_id is not None else ()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self._processor.encode(list(texts), num_threads=1))

    def encode_chat(self, text: str) -> Encoding:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        longest_first = sorted(self.controls, key=len, reverse=True)
        start = 0
        for part in re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if longest_first else [text]:
            if part in self.controls:
                ids.append(self.controls[part])
                spans.append((start, start + len(part)))
            elif part:
                found = _with_offsets(self._processor if start == 0 else self._inner, part)
                ids += found.ids
                spans += [(start + first, start + last) for first, last in found.spans]
            start += len(part)
        return Encoding(ids, spans)

    def _decode(self, ids: list[int]) -> str:
        return str(self._processor.decode(ids))


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`; special tokens are named by the tokenizer_config.json beside it."""

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(f"{path}: reading it needs the tokenizers package; pip install tokenizers") from error
        self.path = path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{path}: not a tokenizer.json ({reason}); give a .model file or tokenizer.json"
            ) from error
        # a file may ask for both, which are the caller's business
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        added = self._tokenizer.get_added_tokens_decoder().items()
        self.controls = {token.content: number for number, token in added if token.special}
        config = _read_config(path)
        self.eos_id = self._special(config.get("eos_token"), USUAL_EOS)
        self.bos_id = self._special(config.get("bos_token"), USUAL_BOS)
        self.pad_id = self._special(config.get("pad_token"), USUAL_PAD)

    def _special(self, token: Any, usual: Sequence[str]) -> int | None:
        # The token is written as a string or as a dict that describes an added token.
        name = token.get("content") if isinstance(token, dict) else token
        ids = (self._tokenizer.token_to_id(candidate) for candidate in ([name] if name else usual))
        return next((found for found in ids if found is not None), None)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    @property
    def prefix(self) -> tuple[int, ...]:
        whole = self._tokenizer.encode("a", add_special_tokens=True)
        return tuple(whole.ids[: whole.special_tokens_mask.index(0)])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def encode_chat(self, text: str) -> Encoding:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return Encoding(list(found.ids), list(found.offsets))

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids))


def _with_offsets(processor: Any, text: str) -> Encoding:
    """sentencepiece's ids with character ranges.

    Its serialized answer (sentencepiece.proto, SentencePieceText) is the one form that all its versions give, and is
    read here without protobuf. Ranges in it are of UTF-8 bytes; of the bytes of one character the last alone has one.
    """
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for number, piece in _fields(processor.encode(text, out_type="serialized_proto")):
        if number == 2:
            values = dict(_fields(piece))
            ids.append(values.get(2, 0))
            spans.append((values.get(4, 0), values.get(5, 0)))
    for i in reversed(range(len(ids) - 1)):
        if spans[i][0] == spans[i][1] and processor.is_byte(ids[i]):
            spans[i] = spans[i + 1]
    if not text.isascii():
        ends = accumulate(len(character.encode()) for character in text)
        character_at = {0: 0} | {end: i for i, end in enumerate(ends, start=1)}
        spans = [(character_at[start], character_at[stop]) for start, stop in spans]
    return Encoding(ids, spans)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message of integers and byte strings."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        key = varint()
        value: int | bytes = varint()
        if key & 7 == 2:
            assert isinstance(value, int)
            position += value
            value = message[position - value : position]
        yield key >> 3, value


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Opens a sentencepiece `.model` file, a `tokenizer.json`, or a folder that holds one of them."""
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
    return HuggingFaceTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)


class StreamDecoder:
    """Text piece by piece as ids arrive; an unfinished UTF-8 character is held back until its bytes are there.

    The pieces joined are `decode` of all ids, as it reads after the ids of `before`.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # The last finished group is decoded again with the new ids: alone, a piece may lose its leading space.
        self._context, self._pending = list(before), list[int]()

    def push(self, token: int) -> str:
        """The text that `token` completes, "" in the middle of a character."""
        self._pending.append(token)
        return "" if (text := self._text()).endswith("\ufffd") else self._take(text)

    def finish(self) -> str:
        """What was held back; bytes that no character came of are U+FFFD."""
        return self._take(self._text()) if self._pending else ""

    def _text(self) -> str:
        return self._tokenizer.decode(self._context + self._pending)

    def _take(self, text: str) -> str:
        new = text[len(self._tokenizer.decode(self._context)) :]
        self._context, self._pending = self._pending, []
        return new
