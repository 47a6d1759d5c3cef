"""sentencepiece models. The library splits the text, after the tokens that other files of the folder add are found."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from megalite.text.encoding import ALIAS, Encoding, Range, Tokenizer, describe_changes, is_control
from megalite.text.tokenizer_files import Added, read_side_files, tokens_to_add

# Concatenated protobuf messages merge. This one is normalizer_spec { add_dummy_prefix: false }.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
# sentencepiece_model.proto: ModelProto.pieces; SentencePiece.piece, SentencePiece.type and its value USER_DEFINED
PIECES, PIECE, TYPE, USER_DEFINED = 1, 1, 3, 4


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model` file with the files next to it, and the added control tokens `add`.

    `defined`: ids of the model's user-defined symbols. `added`: ids of tokens that the model lacks; `ordinary`: those
    of them that are not special. `prefixes`: whether the model adds a space before a text.

    Raises ValueError if a file is damaged or not supported.
    """

    folds = False

    def __init__(self, path: Path, add: Sequence[str] = ()) -> None:
        import sentencepiece

        self.path = path
        side = read_side_files(path)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes() + NO_DUMMY_PREFIX)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path}: not a sentencepiece model; name a .model file or a tokenizer.json") from error
        processor, size = self._processor, self._processor.vocab_size()
        # ids by string of all tokens; an added token never replaces a control piece
        numbers = {processor.id_to_piece(i): i for i in range(size)}
        self._controls = {piece: i for piece, i in numbers.items() if processor.is_control(i)}
        self.defined = {piece: i for piece, i in numbers.items() if self._is_defined(i)}
        self.added: dict[str, int] = {}
        self.ordinary = set[str]()
        declared = {token.content: number for number, token in side.added.items()}
        new = [*tokens_to_add(side, {}), *(Added(content, special=True, normalized=False) for content in add)]
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
        strings = {name: token if isinstance(token, str) else token.content for name, token in side.named.items()}
        self.named |= {name: text for name, text in strings.items() if name != "unk_token" and text in numbers}
        self.eos_id, self.bos_id, self.pad_id = (
            numbers.get(self.named.get(name, "")) for name in ("eos_token", "bos_token", "pad_token")
        )
        named = set(self.named.values())
        self.controls = {
            text: number
            for text, number in (self._controls | self.defined | self.added).items()
            if is_control(text, text in self._controls or text in self.added.keys() - self.ordinary, named)
        }
        self.folds = any(text in self.defined for text in self.controls)
        self.templates, self.template_file = side.templates, side.template_file
        # a legacy LlamaTokenizer also adds a space to text after a control token
        self._spaced = side.options.get("legacy") is True and side.kind == "LlamaTokenizer"
        self.changes = describe_changes(self.added, self.named if side.named else {}, self._spaced)
        adds = side.options.get("add_bos_token", True)
        self.prefix = (self.bos_id,) if adds and self.bos_id is not None else ()

    def _is_defined(self, number: int) -> bool:
        # the library has no test for USER_DEFINED, so exclude the other types first
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
        tokens = self._controls | self.added
        if not aliased:
            return self._split(text, tokens, self._processor, self._inner)
        return self._split(text, {ALIAS + piece: number for piece, number in tokens.items()}, *self._aliased)

    @cached_property
    def _aliased(self) -> tuple[Any, Any]:
        """The model with ALIAS before its user-defined symbols, and the same without the dummy prefix."""
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

    def _split(self, text: str, tokens: dict[str, int], first: Any, later: Any) -> Encoding:
        """Split text at the strings of `tokens`; encode text before the first of them with `first`, else `later`."""
        ids: list[int] = []
        spans: list[Range] = []
        longest_first = sorted(tokens, key=len, reverse=True)
        start = 0
        for part in re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if longest_first else [text]:
            if part in tokens:
                ids.append(tokens[part])
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
    """Encode text with character ranges.

    Only the serialized result (sentencepiece.proto, SentencePieceText) exists in all versions of the library; it is
    parsed here without protobuf. Its ranges count UTF-8 bytes; of the bytes of a character, only the last has one.
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
    """Yield (number, value) of each field of a protobuf message."""
    return ((number, value) for number, value, _ in _raw_fields(message))


def _raw_fields(message: bytes) -> Iterator[tuple[int, Any, bytes]]:
    """Yield (number, value, encoded field) of a protobuf message; the value of a fixed-width field is its bytes."""
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
    """Encode a protobuf field of bytes."""
    size, rest = bytearray(), len(value)
    while rest > 127:
        size.append(rest & 127 | 128)
        rest >>= 7
    return bytes([number << 3 | 2, *size, rest]) + value
