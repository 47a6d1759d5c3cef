"""Convert or inspect instruction data, or train a tokenizer.

python tools/data.py tokenizer corpus.jsonl --vocab-size 32000 --chat --output my-tokenizer
python tools/data.py inspect-sft chats.jsonl --tokenizer tokenizer.json
python tools/data.py sft chats.jsonl --tokenizer tokenizer.json --output-prefix data/chats
"""

import argparse
import json
import sys
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalite.data.indexed import paths
from megalite.data.instructions import Options, examples, write_indexed
from megalite.data.new_tokenizer import new_tokenizer
from megalite.data.packing import Conversations, SftDataset
from megalite.data.report import Report
from megalite.data.survey import histogram, mark_trained, survey
from megalite.launch.arguments import Parser
from megalite.text.chat import ChatTemplate, find_template, template_names
from megalite.text.tokenizer import load_tokenizer

TRAINED, PLAIN = "\033[32m", "\033[0m"


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sft = commands.add_parser("sft", help="render, tokenize and mask a file once, for data.sft=PREFIX")
    inspection = commands.add_parser("inspect-sft", help="show trained text, lengths, packing and likely mistakes")
    tokenizer = commands.add_parser("tokenizer", help="train a tokenizer on text files, for data.tokenizer=FOLDER")
    tokenizer.add_argument(
        "files", nargs="+", metavar="FILE", help=".jsonl (see --json-keys) or .txt, optionally with .gz"
    )
    tokenizer.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="tokens, including control tokens"
    )
    tokenizer.add_argument(
        "--type",
        choices=["sentencepiece", "bpe"],
        default="sentencepiece",
        help="sentencepiece: byte-pair .model; bpe: byte-level tokenizer.json (default: %(default)s)",
    )
    tokenizer.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys of texts (default: text)"
    )
    tokenizer.add_argument(
        "--chat", action="store_true", help="add the tokens of the chatml template, and the template"
    )
    tokenizer.add_argument("--output", required=True, metavar="FOLDER", help="new folder for the tokenizer")
    of_key = "see data.{} (default: %(default)s)"
    roles, modes = ["assistant", "last", "all"], ["escape", "warn", "allow"]
    for command in (sft, inspection):
        add = command.add_argument
        add("file", help=".jsonl, .json or .parquet with messages, ShareGPT, Alpaca or prompt/completion rows")
        add(
            "--tokenizer",
            required=True,
            metavar="PATH",
            help="sentencepiece .model, tokenizer.json, or a folder with one",
        )
        names = ", ".join(template_names())
        add("--template", metavar="NAME", help=f"{names} or a .jinja file (default: the tokenizer's)")
        add("--add-tokens", nargs="+", default=[], metavar="TOKEN", help="see model.add_tokens")
        add("--train-on", choices=roles, default="assistant", help=of_key.format("train_on"))
        add("--control-tokens", choices=modes, default="escape", help=of_key.format("control_tokens"))
    sft.add_argument("--bad-rows", choices=["stop", "skip"], default="stop", help=of_key.format("bad_rows"))
    sft.add_argument("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX and PREFIX_weights")
    sft.add_argument("--overwrite", action="store_true", help="replace existing output")
    inspection.add_argument("--rows", type=int, default=3, metavar="N", help="rows to print in full (default: 3)")
    inspection.add_argument("--seq-len", type=int, default=4096, metavar="N", help="see train.seq_len (default: 4096)")
    cut = ["truncate_right", "truncate_left", "drop"]
    inspection.add_argument("--overlong", choices=cut, default=cut[0], help=of_key.format("overlong"))
    return parser.parse_args()


def train_tokenizer(args: argparse.Namespace) -> None:
    made = new_tokenizer(args.files, Path(args.output), args.vocab_size, args.type, args.chat, args.json_keys)
    print(f"{args.output}: {made.vocab_size} tokens, control tokens {', '.join(made.controls)}")
    print(f"use it with --tokenizer-model {args.output}, data.tokenizer={args.output}")


def convert(args: argparse.Namespace) -> None:
    prefix = Path(args.output_prefix)
    existing = [path for path in paths(prefix) if path.exists()]
    if existing and not args.overwrite:
        raise ValueError(f"{existing[0]} exists; pass --overwrite to replace it or choose another --output-prefix")
    tokenizer = load_tokenizer(args.tokenizer, args.add_tokens)
    template = ChatTemplate(*find_template(args.template, tokenizer), tokenizer)
    options = Options(args.train_on, args.control_tokens, args.bad_rows)
    report = write_indexed(args.file, prefix, tokenizer, template, options)
    for line in report.lines(args.control_tokens):
        print(f"warning: {line}", file=sys.stderr)
    sidecar = json.loads(paths(prefix)[2].read_text("utf-8"))
    conversations, tokens, trained = (sidecar[key] for key in ("documents", "tokens", "trained_tokens"))
    print(f"{prefix}: {conversations} conversations, {tokens} tokens, {trained} trained")
    print(f"train on it with data.sft={prefix}")


def inspect(args: argparse.Namespace) -> None:
    if args.seq_len < 1 or args.rows < 0:
        raise ValueError(f"--seq-len {args.seq_len} must be at least 1, and --rows {args.rows} at least 0")
    tokenizer = load_tokenizer(args.tokenizer, args.add_tokens)
    template = ChatTemplate(*find_template(args.template, tokenizer), tokenizer)
    options = Options(args.train_on, args.control_tokens, bad_rows="skip")
    colours = (TRAINED, PLAIN) if sys.stdout.isatty() else ("⟦", "⟧")
    for example in islice(examples(args.file, tokenizer, template, options, Report()), args.rows):
        sample = "like this".join(colours)
        print(f"--- {example.where}, {len(example.encoding.ids)} tokens, trained text {sample}")
        print(mark_trained(example, *colours).rstrip("\n"))
    with TemporaryDirectory(prefix="megalite-") as folder:
        prefix = Path(folder) / "chats"
        write_indexed(args.file, prefix, tokenizer, template, options)
        data = Conversations(prefix)
        found = survey(data, args.file, args.seq_len, args.overlong)
        print(f"\n{found.summary()}")
        if found.tokens:
            rows = SftDataset(data, found.chosen, args.seq_len, overlong=args.overlong)
            print(f"packed into {len(rows)} rows of {args.seq_len}: {rows.filled:.1%} full")
        print("rows by tokens:", *histogram(data.lengths.tolist()), sep="\n")
        for line in found.notes():
            print(f"warning: {line}")


if __name__ == "__main__":
    try:
        arguments = parse()
        {"tokenizer": train_tokenizer, "sft": convert, "inspect-sft": inspect}[arguments.command](arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
