"""Tokenize text into Megatron-LM's indexed files.

    python tools/preprocess_data.py --input my.jsonl --output-prefix my --tokenizer-model tokenizer.model \\
        --append-eod --workers 4

writes my_text_document.bin, .idx and .json.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megalite.data.preprocess import preprocess
from megalite.launch.arguments import Parser
from megalite.text.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer

# Megatron-LM's names for the two kinds; the kind is determined by the file.
TOKENIZER_TYPES = {
    "SentencePieceTokenizer": SentencePieceTokenizer,
    "GPTSentencePieceTokenizer": SentencePieceTokenizer,
    "Llama2Tokenizer": SentencePieceTokenizer,
    "HuggingFaceTokenizer": HuggingFaceTokenizer,
}


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help=".jsonl or .txt, optionally with .gz")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="one output per key (default: text)")
    add(
        "--document-per",
        choices=["file", "line", "paragraph"],
        default="paragraph",
        help="what a document is in .txt files; a paragraph ends at a blank line (default: paragraph)",
    )
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX_KEY_document.{bin,idx,json}")
    add(
        "--tokenizer-model",
        required=True,
        metavar="PATH",
        help="sentencepiece .model, Hugging Face tokenizer.json, or a folder with one of them",
    )
    add(
        "--tokenizer-type",
        choices=list(TOKENIZER_TYPES),
        help="reject a tokenizer of another kind; Llama2Tokenizer implies --prepend-bos",
    )
    add("--prepend-bos", action="store_true", help="begin each document with the beginning-of-sequence token, e.g. <s>")
    add("--append-eod", action="store_true", help="end each document with the end-of-sequence token")
    add("--workers", type=int, default=1, metavar="N", help="processes; the output does not depend on N (default: 1)")
    add("--log-interval", type=int, default=1000, metavar="N", help="documents between progress lines, 0 for none")
    add("--overwrite", action="store_true", help="replace existing output")
    add("--skip-bad-rows", action="store_true", help="skip and count bad rows instead of stopping at the first")
    return parser.parse_args()


def main() -> None:
    args = parse()
    tokenizer = load_tokenizer(args.tokenizer_model)
    if args.tokenizer_type and not isinstance(tokenizer, TOKENIZER_TYPES[args.tokenizer_type]):
        raise ValueError(
            f"{tokenizer.path} is a {type(tokenizer).__name__}, not a {args.tokenizer_type}; omit --tokenizer-type"
        )
    report = preprocess(
        args.input,
        args.output_prefix,
        tokenizer,
        keys=args.json_keys,
        document_per=args.document_per,
        append_eod=args.append_eod,
        prepend_bos=args.prepend_bos or args.tokenizer_type == "Llama2Tokenizer",
        workers=args.workers,
        skip_bad_rows=args.skip_bad_rows,
        overwrite=args.overwrite,
        log_interval=args.log_interval,
    )
    if report.bad_rows:
        print(f"skipped {len(report.bad_rows)} bad rows; the first: {report.bad_rows[0]}", file=sys.stderr)
    if report.empty:
        print(f"skipped {report.empty} empty texts", file=sys.stderr)
    for written in report.written:
        print(
            f"{written.prefix}: {written.documents} documents, {written.tokens} tokens, "
            f"{written.text_bytes} bytes of text"
        )
    print(f"train on it with data.path={report.written[0].prefix}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
