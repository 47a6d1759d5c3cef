"""sentencepiece models; how text is cut is the library's own, tokens that files beside the model add go before it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from megalite.text.encoding import ALIAS, Encoding, Range, Tokenizer, describe_changes, is_control
from megalite.text.tokenizer_files import Added, read_beside, to_add

# Serialized protobuf messages merge when joined: this one says normalizer_spec { add_dummy_prefix: false }.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
# of sentencepiece_model.proto: ModelProto.pieces; SentencePiece.piece, .type and its value USER_DEFINED
PIECES, PIECE, TYPE, USER_DEFINED = 1, 1, 3, 4


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model` file with the files beside it; `add`: control tokens that are added to it.

    `defined`: user-defined symbols of the model. `added`: tokens that are not its own, `ordinary` those of them that
    are not special. `prefixes`: whether it puts a space before a text.
    """

    folds = False

    def __init__(self, path: Path, add: Sequence[str] = ()) -> None:
        import sentencepiece

        self.path = path
        beside = read_beside(path)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes() + NO_DUMMY_PREFIX)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path}: not a sentencepiece model; give a .model file or tokenizer.json") from error
        processor, size = self._processor, self._processor.vocab_size()
        # bytes and pieces with a meaning are never replaced; what is found first in text, by its string
        numbers = {processor.id_to_piece(i): i for i in range(size)}
        self._controls = {piece: i for piece, i in numbers.items() if processor.is_control(i)}
        self.defined = {piece: i for piece, i in numbers.items() if self._is_defined(i)}
        self.added: dict[str, int] = {}
        self.ordinary = set[str]()
        declared = {token.content: number for number, token in beside.added.items()}
        new = [*to_add(beside, {}), *(Added(content, special=True, normalized=False) for content in add)]
        for token in new:
            if token.content in numbers and (token.content in self._controls or not token.special):
                continue
            number = numbers.get(token.content, declared.get(token.content, size))
            if number >= size:
                number, size = size, size + 1
            self.added[token.content] = numbers[token.content] = number
            self.ordinary |= set() if token.special else {token.content}
        self.vocab_size = size
        self.prefixes = bool(processor.encode("a", out_type=str)[0].startswith("▁"))
        self.named = {
            f"{kind}_token": processor.id_to_piece(number)
            for kind, number in (("bos", processor.bos_id()), ("eos", processor.eos_id()), ("pad", processor.pad_id()))
            if number >= 0
        }
        strings = {name: token if isinstance(token, str) else token.content for name, token in beside.named.items()}
        self.named |= {name: text for name, text in strings.items() if name != "unk_token" and text in numbers}
        self.eos_id, self.bos_id, self.pad_id = (
            numbers.get(self.named.get(name, "")) for name in ("eos_token", "bos_token", "pad_token")
        )
        marks = set(self.named.values())
        self.controls = {
            text: number
            for text, number in (self._controls | self.defined | self.added).items()
            if is_control(text, text in self._controls or text in self.added.keys() - self.ordinary, marks)
        }
        self.folds = any(text in self.defined for text in self.controls)
        self.templates, self.template_file = beside.templates, beside.template_file
        # LlamaTokenizer of old: a space before what follows a control token, as at the beginning of a text
        self._spaced = beside.options.get("legacy") is True and beside.kind == "LlamaTokenizer"
        self.changes = describe_changes(self.added, self.named if beside.named else {}, self._spaced)
        adds = beside.options.get("add_bos_token", True)
        self.prefix = (self.bos_id,) if adds and self.bos_id is not None else ()

    def _is_defined(self, number: int) -> bool:
        # the library tells all types but this one from the others
        p = self._processor
        if p.is_control(number) or p.is_unknown(number) or p.is_byte(number) or p.is_unused(number):
            return False
        return self._types[number] == USER_DEFINED

    @cached_property
    def _types(self) -> list[int]:
        fields = (dict(_fields(piece)) for number, piece, _ in _raw_fields(self._proto) if number == PIECES)
        return [values.get(TYPE, 1) for values in fields]

    @cached_property
    def _proto(self) -> bytes:
        return self.path.read_bytes()

    def encode(self, text: str) -> list[int]:
        if not self.added:
            return list(self._processor.encode(text))
        return self._split(text, self.added, self._processor, self._inner).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self.added:
            return [self.encode(text) for text in texts]
        return list(self._processor.encode(list(texts), num_threads=1))

    def _encode_chat(self, text: str, aliased: bool) -> Encoding:
        apart = self._controls | self.added
        if not aliased:
            return self._split(text, apart, self._processor, self._inner)
        return self._split(text, {ALIAS + piece: number for piece, number in apart.items()}, *self._aliased)

    @cached_property
    def _aliased(self) -> tuple[Any, Any]:
        """The model with ALIAS before its user-defined symbols, and the same without a space before the text."""
        from sentencepiece import SentencePieceProcessor

        proto = b""
        for number, value, raw in _raw_fields(self._proto):
            if number == PIECES and dict(_fields(value)).get(TYPE) == USER_DEFINED:
                inside = b""
                for key, content, whole in _raw_fields(value):
                    named = key == PIECE and content.decode() in self.controls
                    inside += _bytes_field(PIECE, ALIAS.encode() + content) if named else whole
                raw = _bytes_field(PIECES, inside)
            proto += raw
        return SentencePieceProcessor(model_proto=proto), SentencePieceProcessor(model_proto=proto + NO_DUMMY_PREFIX)

    def _split(self, text: str, apart: dict[str, int], first: Any, later: Any) -> Encoding:
        """Text cut at the strings of `apart`; what stands before the first of them by `first`, the rest by `later`."""
        ids: list[int] = []
        spans: list[Range] = []
        longest_first = sorted(apart, key=len, reverse=True)
        start = 0
        for part in re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if longest_first else [text]:
            if part in apart:
                ids.append(apart[part])
                spans.append((start, start + len(part)))
            elif part:
                spaced = start == 0 or (self._spaced and not part.startswith(" "))
                found = _with_offsets(first if spaced else later, part)
                ids += found.ids
                spans += [(start + begin, start + end) for begin, end in found.spans]
            start += len(part)
        return Encoding(ids, spans)

    def _decode(self, ids: list[int]) -> str:
        strings = {number: text for text, number in self.added.items()}
        if not strings:
            return str(self._processor.decode(ids))
        text, run = "", list[int]()
        for token in [*ids, -1]:
            if token >= 0 and token not in strings:
                run.append(token)
                continue
            text += str(self._processor.decode(run)) if run else ""
            run = []
            text += strings[token] if token in strings and strings[token] in self.ordinary else ""
        return text


def _with_offsets(processor: Any, text: str) -> Encoding:
    """sentencepiece's ids with character ranges.

    Its serialized answer (sentencepiece.proto, SentencePieceText) is the one form that all its versions give, and is
    read here without protobuf. Ranges in it are of UTF-8 bytes; of the bytes of one character the last alone has one.
    """
    ids: list[int] = []
    spans: list[Range] = []
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
    """(number, value) of each field of a protobuf message."""
    return ((number, value) for number, value, _ in _raw_fields(message))


def _raw_fields(message: bytes) -> Iterator[tuple[int, Any, bytes]]:
    """(number, value, all its bytes) of each field of a protobuf message; of fixed width, the bytes are the value."""
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
        began, key = position, varint()
        wire = key & 7
        if wire == 0:
            value: int | bytes = varint()
        else:
            size = {1: 8, 5: 4}.get(wire) or varint()
            value = message[position : position + size]
            position += size
        yield key >> 3, value, message[began:position]


def _bytes_field(number: int, value: bytes) -> bytes:
    """A protobuf field of bytes."""
    size, rest = bytearray(), len(value)
    while rest > 127:
        size.append(rest & 127 | 128)
        rest >>= 7
    return bytes([number << 3 | 2, *size, rest]) + value
