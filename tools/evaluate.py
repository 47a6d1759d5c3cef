"""Evaluate a model, on one process or on tp x pp processes.

    python tools/evaluate.py loss MODEL held-out.txt              # nats per token, perplexity, bits per byte
    python tools/evaluate.py choices MODEL rows.jsonl --shots 5   # rows {"prompt", "choices": [...], "label": 0}
    torchrun --nproc_per_node 4 tools/evaluate.py answers MODEL rows.jsonl --tp 2 --pp 2   # {"prompt", "answer"}

MODEL is a run folder, a checkpoint or a Hugging Face folder. For the options see evaluate.py loss --help, and so on.
"""

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalite.config import check
from megalite.config.dtypes import DTYPES
from megalite.data.dataset import check_vocabulary, heldout_windows
from megalite.data.native import open_indexed
from megalite.data.origin import made_with
from megalite.data.preprocess import preprocess
from megalite.inference.chat import Chat
from megalite.inference.eval_rows import (
    choose_shots,
    cloze_sequences,
    exact_match,
    read_clozes,
    read_questions,
    token_f1,
    with_shots,
)
from megalite.inference.reply import Reply, Settings
from megalite.inference.source import Source, open_source
from megalite.launch.arguments import Parser
from megalite.run import together
from megalite.run.agree import paths_report

if TYPE_CHECKING:
    from megalite.engine.stage import Stage
    from megalite.parallel.groups import World

SEQ_LEN = 2048


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    common = Parser(add_help=False)
    common.add_argument(
        "model", help="run folder, one of its checkpoints (RUN/checkpoints/step-NNNNNNNN), or Hugging Face folder"
    )
    common.add_argument("data", help="file to evaluate on")
    common.add_argument(
        "--tp", type=int, metavar="N", help="tensor-parallel ranks (default: the most that can split the model)"
    )
    common.add_argument("--pp", type=int, metavar="N", help="pipeline stages (default: ranks / tp)")
    common.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: a GPU if there is one)"
    )
    common.add_argument("--dtype", choices=tuple(DTYPES), help="of weights and activations (default: the model's)")
    common.add_argument("--json", metavar="FILE", help="write the figures, and the result of each row, to FILE")
    rows = Parser(add_help=False)
    rows.add_argument(
        "--shots", type=int, default=0, metavar="K", help="solved examples shown before each row (default: 0)"
    )
    rows.add_argument(
        "--shots-from", metavar="FILE", help="rows to draw examples from (default: DATA, leaving them out of the test)"
    )
    rows.add_argument("--seed", type=int, default=0, metavar="N", help="seed for drawing the examples (default: 0)")
    rows.add_argument("--delimiter", default=" ", metavar="TEXT", help="between prompt and answer (default: a space)")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="loss|answers|choices")
    add_verbs(verbs, common, rows)
    return parser.parse_args()


def add_verbs(verbs: "argparse._SubParsersAction[Parser]", common: Parser, rows: Parser) -> None:
    """The parsers of loss, answers and choices; `common`, `rows`: options that they share."""
    loss = verbs.add_parser(
        "loss",
        parents=[common],
        help="held-out loss on text (*.jsonl, *.txt) or indexed data",
        description="Held-out loss in nats per token, perplexity and, where the text's size is known, bits per byte.\n"
        "DATA is a *.jsonl file with a text key, a *.txt file, or the prefix of a .bin/.idx pair.",
    )
    loss.add_argument(
        "--seq-len", type=int, metavar="N", help=f"window length in tokens (default: the model's, at most {SEQ_LEN})"
    )
    loss.add_argument("--batch-size", type=int, default=1, metavar="N", help="windows per forward pass (default: 1)")
    answers = verbs.add_parser(
        "answers",
        parents=[common, rows],
        help="exact match and F1 of greedy answers",
        description='Exact match and F1 (SQuAD) of greedy answers to rows {"prompt": text, "answer": text or list}.',
    )
    answers.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="longest answer in tokens (default: %(default)s)"
    )
    answers.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="text that ends an answer (default: a newline; with --chat none)",
    )
    answers.add_argument("--chat", action="store_true", help="ask with the chat template")
    answers.add_argument(
        "--template",
        metavar="NAME",
        help="chat template for --chat: built-in name or .jinja file (default: the tokenizer's own)",
    )
    answers.add_argument("--batch-size", type=int, default=8, metavar="N", help="answers at a time (default: 8)")
    verbs.add_parser(
        "choices",
        parents=[common, rows],
        help="accuracy of the likeliest choice",
        description='Accuracy of the likeliest choice, in rows {"prompt": text, "choices": [text, ...], "label": 0}.',
    )


def main() -> int:
    options = parse()
    results: dict[str, Any] = {"verb": options.verb, "model": options.model, "data": options.data}
    try:
        layout = {"tp": options.tp, "pp": options.pp, "world_size": together.WORLD_SIZE}
        source = open_source(options.model, **layout, device=options.device, dtype=options.dtype)
        if getattr(options, "batch_size", 1) < 1:
            raise ValueError(f"--batch-size {options.batch_size} must be at least 1")
        if options.json and together.RANK == 0:
            Path(options.json).touch()  # fail now rather than after hours
        with tempfile.TemporaryDirectory(prefix="megalite-") as scratch:
            prepared = {"loss": loss, "answers": answers, "choices": choices}[options.verb](options, source, scratch)
            mine = paths_report({"model": options.model, "data": options.data}, together.HERE)
            status = together.in_world(
                prepared[0].config, lambda world: results.update(measure(world, *prepared)), mine
            )
    except (ValueError, OSError) as error:
        return together.fail(error)
    if status == 0 and together.RANK == 0:
        if options.json:
            Path(options.json).write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        for name, value in results.items():
            if name != "rows":
                print(f"{name:<22} {value:.4f}" if isinstance(value, float) else f"{name:<22} {value}")
    return status


def measure(world: "World", source: Source, run: Any) -> dict[str, Any]:
    from megalite.inference.decode import load_stage

    figures: dict[str, Any] = run(load_stage(source, world))
    return figures


def loss(options: argparse.Namespace, source: Source, scratch: str) -> tuple[Source, Any]:
    """Prepare `loss`: a text file is tokenized first, its documents joined as by preprocessing with --append-eod."""
    text = options.data.removesuffix(".gz").endswith((".jsonl", ".json", ".txt"))
    prefix = options.data
    if text:
        eod = source.tokenizer.eos_id is not None
        report = preprocess(
            [options.data], f"{scratch}/rank-{together.RANK}", source.tokenizer, append_eod=eod, log_interval=0
        )
        prefix = str(report.written[0].prefix)
    elif Path(prefix).is_file():
        raise ValueError(
            f"{prefix}: unknown kind of file; give a *.jsonl or *.txt file, or the prefix of a .bin/.idx pair"
        )
    indexed = open_indexed(prefix)
    if together.RANK == 0 and not made_with(prefix, source.tokenizer):
        print(f"note: {prefix} was not made with the model's tokenizer {source.tokenizer.path}", file=sys.stderr)
    check_vocabulary(indexed, source.config.model.vocab_size)
    seq_len = options.seq_len or min(source.config.train.seq_len, SEQ_LEN)
    if options.seq_len is not None and options.seq_len < 1:
        raise ValueError(f"--seq-len {options.seq_len} must be at least 1")
    if source.limit is not None and seq_len > source.limit:
        raise ValueError(
            f"--seq-len {seq_len} exceeds the model's {source.limit} positions; use at most {source.limit}"
        )
    train = dataclasses.replace(source.config.train, seq_len=seq_len, micro_batch_size=options.batch_size)
    config = dataclasses.replace(source.config, train=dataclasses.replace(train, global_batch_size=options.batch_size))
    check(config, together.WORLD_SIZE)
    windows = heldout_windows(indexed, seq_len)
    text_bytes = indexed.sidecar.get("text_bytes")

    def run(stage: "Stage") -> dict[str, Any]:
        from megalite.engine.heldout import held_out

        sums = held_out(stage, windows, "held-out loss", shows=stage.mesh.world.rank == 0)
        nats, tokens = sums["loss"], sums["tokens"]
        found = {
            "seq_len": seq_len,
            "tokens": int(tokens),
            "loss": nats / tokens,
            "perplexity": math.exp(nats / tokens),
        }
        # the first token of the text is never predicted
        return found | ({"bits_per_byte": nats / math.log(2) / text_bytes} if text_bytes else {})

    return dataclasses.replace(source, config=config), run


def answers(options: argparse.Namespace, source: Source, scratch: str) -> tuple[Source, Any]:
    """Prepare `answers`: greedy answers, compared with the correct ones."""
    pool = None if options.shots_from is None else read_questions(options.shots_from)
    shots, rows = choose_shots(read_questions(options.data), pool, options.shots, options.seed)
    chat = Chat(source.tokenizer, options.template) if options.chat else None
    usual = [] if chat else ["\n"]
    settings = Settings(options.max_new_tokens, stop=tuple(usual if options.stop is None else options.stop))
    stops = source.stops | (chat.stops if chat else frozenset())
    replies = []
    for number, row in enumerate(rows, start=1):
        prompt = with_shots(shots, row.prompt, options.delimiter)
        try:
            ids = (
                chat.prompt([{"role": "user", "content": prompt}])
                if chat
                else [*source.start, *source.tokenizer.encode(prompt)]
            )
            reply = Reply(source.tokenizer, ids, settings, stops, source.limit)
        except ValueError as error:
            raise ValueError(f"{row.where or f'row {number}'}: {error}") from None
        replies.append(reply)

    def run(stage: "Stage") -> dict[str, Any]:
        from megalite.inference.measure import answer

        answer(stage, replies, settings, options.batch_size)
        found: list[dict[str, Any]] = [
            {"prompt": row.prompt, "answers": row.answers, "said": reply.text.strip(), "ended": reply.ended}
            | {"exact_match": exact_match(reply.text, row.answers), "f1": token_f1(reply.text, row.answers)}
            for row, reply in zip(rows, replies, strict=True)
        ]
        means = {name: sum(each[name] for each in found) / len(found) for name in ("exact_match", "f1")}
        stopped = sum(each["ended"] == "stop token" for each in found) / len(found)
        return {"shots": len(shots), "tested": len(rows), **means, "ended_by_token": stopped, "rows": found}

    return source, run


def choices(options: argparse.Namespace, source: Source, scratch: str) -> tuple[Source, Any]:
    """Prepare `choices`: the likeliest choice of each row by sum, by sum per token, by sum per character."""
    pool = None if options.shots_from is None else read_clozes(options.shots_from)
    shots, rows = choose_shots(read_clozes(options.data), pool, options.shots, options.seed)
    sequences = cloze_sequences(source, rows, shots, options.delimiter)

    def run(stage: "Stage") -> dict[str, Any]:
        from megalite.inference.measure import score

        scores = score(stage, rows, sequences)
        found: list[dict[str, Any]] = [
            {"prompt": row.prompt, "choices": row.choices, "label": row.label, "log_likelihoods": each.sums}
            | {"best": each.best(), "best_per_token": each.best(each.tokens)}
            | {"best_per_character": each.best(each.characters)}
            for row, each in zip(rows, scores, strict=True)
        ]
        accuracy = {
            "accuracy" + kind: sum(each["best" + kind] == each["label"] for each in found) / len(found)
            for kind in ("", "_per_token", "_per_character")
        }
        return {"shots": len(shots), "tested": len(rows), **accuracy, "rows": found}

    return source, run


if __name__ == "__main__":
    together.leave(main())
