"""Hugging Face tokenizer files, opened as transformers' AutoTokenizer opens their folders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from megalite.text.encoding import ALIAS, Encoding, Tokenizer, describe_changes, is_control
from megalite.text.tokenizer_files import Added, SideFiles, read_side_files, tokens_to_add

# Common strings of special tokens, for a tokenizer.json without other files.
USUAL = {
    "eos_token": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "[EOS]"),
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "[BOS]"),
    "pad_token": ("<pad>", "[PAD]", "<|pad|>"),
}
# the pre-tokenization pattern of Qwen2Tokenizer
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` with the files next to it, and the added control tokens `add`.

    Raises ValueError if a file is damaged or not supported.
    """

    def __init__(self, path: Path, add: Sequence[str] = ()) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(f"{path}: reading it needs the tokenizers package; pip install tokenizers") from error
        self.path = path
        side = read_side_files(path)
        try:
            with _no_panic(path):
                inner = tokenizers.Tokenizer.from_file(str(path))
        except ValueError:
            raise
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{path}: not a tokenizer.json ({reason}); name a .model file or a tokenizer.json"
            ) from error
        post_processor = inner.post_processor
        if side.kind != "TokenizersBackend":
            inner = _rebuild(inner, side)
        self._tokenizer = inner
        before = _known(inner)
        new = tokens_to_add(side, before)
        if side.kind == "Qwen2Tokenizer":
            new += [Added(content, normalized=False, special=True) for content in _contents(side)]
        self._add(new)
        self._add([Added(content, normalized=False, special=True) for content in add])
        inner.encode_special_tokens = bool(side.options.get("split_special_tokens"))
        # a file may enable both, but only the caller knows whether they fit
        inner.no_truncation()
        inner.no_padding()
        self.named = {name: token if isinstance(token, str) else token.content for name, token in side.named.items()}
        if side.alone:
            self.named = {key: name for key, names in USUAL.items() if (name := self._first(names)) is not None}
        self.eos_id, self.bos_id, self.pad_id = (
            inner.token_to_id(self.named[name]) if name in self.named else None
            for name in ("eos_token", "bos_token", "pad_token")
        )
        self.vocab_size = 1 + max(inner.get_vocab(with_added_tokens=True).values())
        self.templates, self.template_file = side.templates, side.template_file
        known, strings = inner.get_added_tokens_decoder(), set(self.named.values())
        control = {number: t for number, t in known.items() if is_control(t.content, t.special, strings)}
        self.controls = {token.content: number for number, token in control.items()}
        self.folds = inner.normalizer is not None and any(token.normalized for token in control.values())
        other = [token for token in new if token not in before.values()]
        kind = side.kind if side.kind != "TokenizersBackend" else ""
        self.changes = describe_changes(other, list(add), kind, inner.encode_special_tokens)
        # the post-processor is used only here, to find the prefix: it may also trim the character ranges of tokens
        inner.post_processor = post_processor
        with _no_panic(path):
            whole = inner.encode("a", add_special_tokens=True)
        self._post_processor = post_processor
        first = whole.special_tokens_mask.index(0) if 0 in whole.special_tokens_mask else 0
        self.prefix = tuple(whole.ids[:first])
        inner.post_processor = None

    def _add(self, tokens: Sequence[Added]) -> None:
        from tokenizers import AddedToken

        known = [{key: value for key, value in token._asdict().items() if value is not None} for token in tokens]
        self._tokenizer.add_tokens([AddedToken(**fields) for fields in known])

    def _first(self, names: Sequence[str]) -> str | None:
        return next((name for name in names if self._tokenizer.token_to_id(name) is not None), None)

    def encode(self, text: str) -> list[int]:
        with _no_panic(self.path):
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with _no_panic(self.path):
            return [found.ids for found in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def _encode_chat(self, text: str, aliased: bool) -> Encoding:
        inner, numbers = self._aliased if aliased else (self._tokenizer, {})
        with _no_panic(self.path):
            found = inner.encode(text, add_special_tokens=False)
        ids = [numbers.get(token, token) for token in found.ids]
        spans, controls = list(found.offsets), set(self.controls.values())
        for i, (token, (start, stop)) in enumerate(zip(ids, spans)):
            if token in controls:  # lstrip and rstrip make a token include the spaces around it
                inside = text[start:stop]
                left = len(inside) - len(inside.lstrip())
                spans[i] = (start + left, max(start + left, start + len(inside.rstrip())))
        if spans and spans[-1][1] < len(text.rstrip()):
            # the library derives offsets from tokens, so they are wrong after a dropped character
            raise ValueError(
                f"{self.path}: drops characters that are not in its vocabulary, so the tokens of an answer cannot be "
                f"located; use a tokenizer with an unknown token or byte fallback"
            )
        return Encoding(ids, spans)

    @cached_property
    def _aliased(self) -> tuple[Any, dict[int, int]]:
        """The same tokenizer with ALIAS before its control strings, and a map from its ids of added tokens to ours."""
        from tokenizers import Tokenizer

        file = json.loads(self._tokenizer.to_str())
        added, file["added_tokens"] = file["added_tokens"], []
        other = HuggingFaceTokenizer.__new__(HuggingFaceTokenizer)
        other._tokenizer = Tokenizer.from_str(json.dumps(file))
        numbers: dict[int, int] = {}
        for token in sorted(added, key=lambda token: token["id"]):
            number, content = token.pop("id"), token["content"]
            token["content"] = ALIAS + content if content in self.controls else content
            other._add([Added(**token)])
            aliased_number = other._tokenizer.token_to_id(token["content"])
            assert aliased_number is not None
            numbers[aliased_number] = number
        return other._tokenizer, numbers

    def _decode(self, ids: list[int]) -> str:
        with _no_panic(self.path):
            return str(self._tokenizer.decode(ids))

    def save(self, path: Path) -> None:
        """Write the tokenizer, including added tokens, as one tokenizer.json."""
        self._tokenizer.post_processor = self._post_processor
        self._tokenizer.save(str(path))
        self._tokenizer.post_processor = None


@contextmanager
def _no_panic(path: Path) -> Iterator[None]:
    """Turn a panic of the library, for example at a pattern that backtracks too long, into ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise ValueError(
            f"{path}: the tokenizers library cannot split this text with its patterns ({reason})"
        ) from None


def _known(inner: Any) -> dict[int, Added]:
    known = inner.get_added_tokens_decoder().items()
    return {number: Added(t.content, t.single_word, t.lstrip, t.rstrip, t.normalized, t.special) for number, t in known}


def _contents(side: SideFiles) -> list[str]:
    tokens = (*side.named.values(), *side.extra)
    return list(dict.fromkeys(token if isinstance(token, str) else token.content for token in tokens))


def _rebuild(inner: Any, side: SideFiles) -> Any:
    """Combine the vocabulary of a tokenizer.json with the steps of its transformers class."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = json.loads(inner.to_str())["model"]
    if model["type"] != "BPE":
        raise ValueError(f"tokenizer_class={side.kind} needs a BPE vocabulary, tokenizer.json has {model['type']}")
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    merges = [(left, right) for left, right in pairs]
    llama, qwen2 = side.kind == "LlamaTokenizer", side.kind == "Qwen2Tokenizer"
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, fuse_unk=llama, byte_fallback=llama))
    option = side.options.get("add_prefix_space")
    prefix = bool(llama if option is None else option)
    if llama:
        scheme = "never" if not prefix else "always" if side.options.get("legacy") else "first"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
        return tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if qwen2:
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN2), behavior="isolated", invert=False)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return tokenizer
