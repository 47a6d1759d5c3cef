"""A run's own tokenizer as the files that transformers' AutoTokenizer opens.

A sentencepiece BPE model becomes a tokenizer.json with the same pieces and merges. Whether it cuts text as the model
does is tried before it is kept.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megalite.data.tokenizer import SentencePieceTokenizer, load_tokenizer

SPACE = "▁"
# texts on which both have to agree: spaces, lines, digits, scripts, bytes without a piece
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


def write_tokenizer(source: Path, target: Path) -> dict[str, int | None]:
    """Write `source`, a tokenizer.json or sentencepiece .model, to the folder `target` as AutoTokenizer opens it.

    Gives bos_token_id, eos_token_id and pad_token_id for config.json. ValueError where a sentencepiece model is of a
    kind that has no equal tokenizer.json.
    """
    opened = load_tokenizer(source)
    ids = {"bos_token_id": opened.bos_id, "eos_token_id": opened.eos_id, "pad_token_id": opened.pad_id}
    config = target / "tokenizer_config.json"
    if isinstance(opened, SentencePieceTokenizer):
        made, names = _from_sentencepiece(opened)
        made.save(str(target / "tokenizer.json"))
        shutil.copyfile(source, target / "tokenizer.model")
        _write(config, names)
        return ids
    shutil.copyfile(source, target / "tokenizer.json")
    beside = source.with_name(config.name)
    if beside.is_file():
        shutil.copyfile(beside, config)
    else:
        from tokenizers import Tokenizer

        pieces = Tokenizer.from_file(str(source))
        _write(config, {key.removesuffix("_id"): str(pieces.id_to_token(i)) for key, i in ids.items() if i is not None})
    return ids


def _write(path: Path, names: dict[str, str]) -> None:
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _from_sentencepiece(opened: SentencePieceTokenizer) -> tuple[Any, dict[str, str]]:
    """A tokenizers.Tokenizer that cuts text as `opened` does, and the names of its special tokens."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    processor = SentencePieceProcessor(model_file=str(opened.path))
    pieces = [processor.id_to_piece(i) for i in range(opened.vocab_size)]
    rank = {piece: i for i, piece in enumerate(pieces)}
    # the parts that a piece was merged of: all pairs of pieces, the merges learned first coming first
    merges = []
    for i, piece in enumerate(pieces):
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i)):
            pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            known = sorted((p for p in pairs if p[0] in rank and p[1] in rank), key=lambda p: (rank[p[0]], rank[p[1]]))
            merges += [(-processor.get_score(i), pair) for pair in known]
    merges.sort(key=lambda merge: merge[0])
    unknown = pieces[processor.unk_id()]
    made = Tokenizer(models.BPE(rank, [m[1] for m in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = processor.encode("a", out_type=str)[0].startswith(SPACE)
    steps = [normalizers.Prepend(SPACE)] * prefix + [normalizers.Replace(" ", SPACE)]
    made.normalizer = normalizers.Sequence(steps)
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(back + [decoders.Strip(" ", 1, 0)] * prefix)
    special = [p for i, p in enumerate(pieces) if processor.is_control(i) or processor.is_unknown(i)]
    for text in TRIALS:
        if made.encode(text, add_special_tokens=False).ids != opened.encode(text):
            raise ValueError(
                f"{opened.path}: no tokenizer.json cuts text as this sentencepiece model does (it is not plain BPE: "
                f"{text!r} comes out otherwise); put a tokenizer.json beside it in its place"
            )
    made.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    names = {"unk_token": unknown}
    for key, token in (("bos_token", opened.bos_id), ("eos_token", opened.eos_id), ("pad_token", opened.pad_id)):
        if token is not None:
            names[key] = pieces[token]
    return made, names
