"""Write a run's tokenizer as files for transformers' AutoTokenizer.

A sentencepiece BPE model becomes a tokenizer.json with the same pieces and merges, which is kept only if it splits
trial texts as the model does.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megalite.text.encoding import Tokenizer
from megalite.text.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer
from megalite.text.tokenizer_files import ADDED, CONFIG, MAP, copy_templates, read_optional_json

SPACE = "▁"
# texts on which both must agree: spaces, lines, digits, scripts, bytes without a piece
TRIALS = (
    *("a", " a", "a b", "  two  spaces ", "In the beginning God created the heaven and the earth.", "tab\tnew\n\nline"),
    *(
        "x = 3.14159 + 2026; # code",
        "海上生明月，天涯共此時",
        "Ærøskøbing naïve café",
        "Привет, мир",
        "😀👩‍🚀 \u200b\u00a0!",
        "ﬁﬃ①",
    ),
)


def write_tokenizer(
    source: Path, target: Path, add: Iterable[str] = (), model_type: str | None = None
) -> dict[str, int | None]:
    """Write the tokenizer file or folder `source` to the folder `target`, so that AutoTokenizer encodes the same.

    `add`: as model.add_tokens. `model_type`: that of the config.json to be written there. Returns its bos_token_id,
    eos_token_id and pad_token_id. Raises ValueError if no tokenizer.json equals a sentencepiece model, or transformers
    would split text differently.
    """
    opened = load_tokenizer(source, tuple(add))
    options = read_optional_json(opened.path.with_name(CONFIG))
    # tokenizer.json holds all tokens, and the special ones are named below
    for key in [key for key in options if key.endswith(("_token", "_special_tokens", "_tokens_decoder"))]:
        if not isinstance(options[key], bool):
            del options[key]
    for key in ("auto_map", "add_bos_token", "add_eos_token", "legacy", "add_prefix_space"):
        options.pop(key, None)
    for name in (MAP, ADDED):
        (target / name).unlink(missing_ok=True)
    names = opened.named
    if isinstance(opened, SentencePieceTokenizer):
        made, unknown = _from_sentencepiece(opened)
        made.save(str(target / "tokenizer.json"))
        shutil.copyfile(opened.path, target / "tokenizer.model")
        names = {"unk_token": unknown, **names}
    elif isinstance(opened, HuggingFaceTokenizer):
        opened.save(target / "tokenizer.json")
    options |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (target / CONFIG).write_text(json.dumps(options, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    copy_templates(opened.path.parent, target)
    if model_type is not None:
        (target / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        _require_equal(opened, load_tokenizer(target / "tokenizer.json"), model_type)
    return {"bos_token_id": opened.bos_id, "eos_token_id": opened.eos_id, "pad_token_id": opened.pad_id}


def _require_equal(here: Tokenizer, there: Tokenizer, model_type: str) -> None:
    for text in TRIALS:
        if not _leading_space(here, text) and here.encode(text) != there.encode(text):
            raise ValueError(
                f"{here.path}: for a {model_type} model transformers adds its own steps to the tokenizer, which split "
                f"{text!r} differently; export without data.tokenizer, and open this file as PreTrainedTokenizerFast"
            )


def _leading_space(here: Tokenizer, text: str) -> bool:
    """Whether a text starts with a space, before which sentencepiece adds another and tokenizers does not."""
    return isinstance(here, SentencePieceTokenizer) and here.prefixes and text.startswith(" ")


def _from_sentencepiece(opened: SentencePieceTokenizer) -> tuple[Any, str]:
    """A tokenizers.Tokenizer that splits text as `opened` does, and its unknown piece. Raises ValueError for none."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    processor = SentencePieceProcessor(model_file=str(opened.path))
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    rank = {piece: i for i, piece in enumerate(pieces)}
    # merges: for each piece all pairs of pieces that form it, those learned first coming first
    merges = []
    for i, piece in enumerate(pieces):
        given = processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i) or piece in opened.defined
        if not given:
            pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            known = sorted((p for p in pairs if p[0] in rank and p[1] in rank), key=lambda p: (rank[p[0]], rank[p[1]]))
            merges += [(-processor.get_score(i), pair) for pair in known]
    merges.sort(key=lambda merge: merge[0])
    unknown, defined = pieces[processor.unk_id()], sorted(opened.defined, key=len, reverse=True)
    # if a space is added before the text, user-defined symbols must be found after that: by a pre-tokenizer
    split = opened.prefixes and bool(defined)
    bpe = models.BPE(
        rank, [m[1] for m in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True, ignore_merges=split
    )
    made = Tokenizer(bpe)
    made.normalizer = normalizers.Replace(" ", SPACE)
    if opened.prefixes:
        # only before the text, as in sentencepiece: not after each control token
        first = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
        symbols = pre_tokenizers.Split(Regex("|".join(map(re.escape, defined))), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([first, symbols]) if split else first
    else:
        # sentencepiece finds user-defined symbols in text with its spaces replaced
        made.add_tokens([AddedToken(piece, special=False, normalized=SPACE in piece) for piece in defined])
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(back + [decoders.Strip(" ", 1, 0)] * opened.prefixes)
    _try(opened, made, processor, split)
    special = [p for i, p in enumerate(pieces) if processor.is_control(i) or processor.is_unknown(i)]
    made.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    for text, number in sorted(opened.added.items(), key=lambda item: item[1]):
        made.add_tokens([AddedToken(text, special=text not in opened.ordinary, normalized=False)])
        if made.token_to_id(text) != number:
            raise ValueError(
                f"{opened.path}: {text} is token {number} here and would have another id in tokenizer.json"
            )
    return made, unknown


def _try(opened: SentencePieceTokenizer, made: Any, processor: Any, every_piece: bool) -> None:
    """Raise ValueError if `made` splits a trial text differently from the model."""
    texts = [*TRIALS]
    for symbol in opened.defined:
        texts += [symbol, f"a{symbol}b", f"a {symbol} {symbol}\n{symbol}c"]
    if every_piece:
        texts += [processor.id_to_piece(i).replace(SPACE, " ") for i in range(processor.vocab_size())]
    for text in texts:
        if _leading_space(opened, text) or not text:
            continue
        if made.encode(text, add_special_tokens=False).ids != processor.encode(text):
            raise ValueError(
                f"{opened.path}: no tokenizer.json splits text as this sentencepiece model does (it is not plain BPE: "
                f"{text!r} differs); use a tokenizer.json instead"
            )
