"""Generate text with a trained model, on one process or on tp x pp processes.

    python tools/generate.py runs/tiny --prompt "In the beginning"
    torchrun --nproc_per_node 4 tools/generate.py runs/tiny --tp 2 --pp 2 --prompts prompts.txt
    python tools/generate.py runs/sft --chat                     # a conversation; Ctrl-D ends it
    python tools/generate.py path/to/huggingface-model --chat "Who are you?" --temperature 0

Without --prompt, --prompts or --chat, each line of standard input is continued.

The KV cache holds 2 x layers x kv heads x head dim numbers, in the model's dtype,
per token of each prompt and reply, divided by tp x pp.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalite.config.dtypes import DTYPES
from megalite.inference.chat import Chat
from megalite.inference.reply import Reply, Settings, in_order
from megalite.inference.source import Source, open_source
from megalite.launch.arguments import Parser
from megalite.run import together
from megalite.run.agree import paths_report
from megalite.text.rows import decode, file_suffix, nonblank_lines, parse_json, text_fault

if TYPE_CHECKING:
    from megalite.engine.stage import Stage
    from megalite.parallel.groups import World

WEEK_S = 7 * 24 * 3600.0


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("model", help="run folder, one of its checkpoints (RUN/checkpoints/step-NNNNNNNN), or Hugging Face folder")
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be repeated")
    add("--prompts", metavar="FILE", help='file of prompts: one per line, or *.jsonl with {"prompt": ...}')
    add("--chat", nargs="?", const="", metavar="TEXT", help="answer TEXT as a chat; without TEXT, start a conversation")
    add("--system", metavar="TEXT", help="system message for --chat")
    add("--template", metavar="NAME", help="chat template: built-in name or .jinja file (default: the tokenizer's own)")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="longest reply in tokens (default: %(default)s)")
    add(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="0: always the likeliest token (default: %(default)s)",
    )
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens (default: 0, all)")
    add(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="sample from the likeliest tokens whose probabilities add up to P (default: %(default)s)",
    )
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1 makes tokens seen before less likely (default: 1)",
    )
    add("--stop", action="append", default=[], metavar="TEXT", help="end the reply before TEXT; may be repeated")
    add("--seed", type=int, default=0, metavar="N", help="prompt i is sampled with seed N + i (default: 0)")
    add("--tp", type=int, metavar="N", help="tensor-parallel ranks (default: the most that can split the model)")
    add("--pp", type=int, metavar="N", help="pipeline stages (default: ranks / tp)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: a GPU if there is one)")
    add("--dtype", choices=tuple(DTYPES), help="of weights and activations (default: the model's)")
    return parser.parse_args()


def main() -> int:
    options = parse()
    asked = options.prompt or options.prompts or options.chat
    try:
        settings = Settings(
            options.max_new_tokens,
            options.temperature,
            options.top_k,
            options.top_p,
            options.repetition_penalty,
            options.seed,
            tuple(options.stop),
        )
        prompts = [*options.prompt, *(read_prompts(Path(options.prompts)) if options.prompts else [])]
        if options.chat is not None and prompts:
            raise ValueError("--chat cannot be combined with --prompt or --prompts; remove one of them")
        source = open_source(
            options.model,
            tp=options.tp,
            pp=options.pp,
            world_size=together.WORLD_SIZE,
            device=options.device,
            dtype=options.dtype,
            # ranks that wait for the user to type must not time out
            timeout_s=600.0 if asked else WEEK_S,
        )
        chat = None
        if options.chat is not None:
            chat = Chat(source.tokenizer, options.template, options.system)
            source = dataclasses.replace(source, stops=source.stops | chat.stops)
        if options.chat:
            replies = [reply(source, chat, options.chat, settings)]
        else:
            replies = [reply(source, None, prompt, settings) for prompt in prompts]
        mine = paths_report({"model": options.model}, together.HERE)
    except (ValueError, OSError) as error:
        return together.fail(error)

    def run(world: "World") -> None:
        from megalite.inference.decode import load_stage

        stage = load_stage(source, world)
        if replies:
            show(stage, prompts or [""], replies, settings)
        else:
            interact(stage, source, chat, settings)

    return together.in_world(source.config, run, mine)


def read_prompts(path: Path) -> list[str]:
    """Read one prompt per line, or the "prompt" of each row of a *.jsonl file. Raises ValueError at file:line."""
    if not path.is_file():
        raise ValueError(f"--prompts {path}: no such file; create it with one prompt per line, or use --prompt TEXT")
    found = []
    for where, raw in nonblank_lines(path):
        try:
            found.append(_prompt(raw, is_json=file_suffix(path) in (".jsonl", ".json")))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not found:
        raise ValueError(f"{path}: contains no prompts; write one per line")
    return found


def _prompt(raw: bytes, is_json: bool) -> str:
    prompt = decode(raw.rstrip(b"\r\n"))
    if is_json:
        row = parse_json(raw)
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError('expected a JSON object with a text "prompt"')
        prompt = row["prompt"]
    if fault := text_fault(prompt):
        raise ValueError(f"the prompt {fault}")
    return prompt


def reply(source: Source, chat: Chat | None, prompt: str, settings: Settings) -> Reply:
    """An empty reply to `prompt`: its continuation, or with `chat` the assistant's answer."""
    if fault := text_fault(prompt):
        raise ValueError(f"the prompt {fault}")
    ids = [*source.start, *source.tokenizer.encode(prompt)] if chat is None else chat.ask(prompt)
    return Reply(source.tokenizer, ids, settings, source.stops, source.limit)


def show(stage: "Stage", prompts: Sequence[str], replies: Sequence[Reply], settings: Settings) -> None:
    """Print prompts and replies one after the other, as they are generated."""
    from megalite.inference.decode import stream

    begun = set[int]()
    for number, text in in_order(stream(stage, replies, settings), replies):
        if number not in begun:
            write(("\n\n" if begun else "") + prompts[number])
            begun.add(number)
        write(text)
    write("\n")
    note(stage, replies)


def interact(stage: "Stage", source: Source, chat: Chat | None, settings: Settings) -> None:
    """Continue or answer each line of standard input, until its end."""
    from megalite.inference.decode import stream
    from megalite.parallel.groups import share_text

    for line in lines():
        line = share_text(stage.mesh.world, line, stage.mesh.device)
        if line is None:
            return
        try:
            answer = reply(source, chat, line, settings)
        except ValueError as error:
            write(f"error: {error}\n")
            if chat is not None:
                return  # a conversation only grows, so the next line would not fit either
            continue
        for _, text in stream(stage, [answer], settings):
            write(text)
        if chat is not None:
            chat.answered(answer.text)
        write("\n")
        note(stage, [answer])


def lines() -> Iterator[str | None]:
    """Yield the lines of standard input on rank 0, then None; on other ranks always None."""
    while True:
        line = None
        if together.RANK == 0:
            try:
                line = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                line = None
        yield line


def write(text: str) -> None:
    if together.RANK == 0:
        print(text, end="", flush=True)


def note(stage: "Stage", replies: Sequence[Reply]) -> None:
    """Print a note if a reply ended at the model's last position, or is longer than the training sequences."""
    if together.RANK != 0:
        return
    trained = stage.config.train.seq_len
    if any(each.ended == "context end" for each in replies):
        print("note: stopped at the model's last position", file=sys.stderr)
    elif any(len(each.prompt) + len(each.ids) > trained for each in replies):
        print(f"note: the model was trained on {trained} tokens; longer texts may be worse", file=sys.stderr)


if __name__ == "__main__":
    together.leave(main())
