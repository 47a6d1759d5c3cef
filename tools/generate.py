"""Continues prompts with a trained model, on one process or on tp x pp of them.

    python tools/generate.py runs/tiny --prompt "In the beginning"
    torchrun --nproc_per_node 4 tools/generate.py runs/tiny --tp 2 --pp 2 --prompts prompts.txt
    python tools/generate.py runs/sft --chat                     # a conversation; Ctrl-D ends it
    python tools/generate.py path/to/huggingface-model --chat "Who are you?" --temperature 0

The KV cache takes 2 x layers x kv heads x head dim numbers of the model's dtype a
token and prompt, divided by tp x pp.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalite.inference.chat import Chat
from megalite.inference.reply import Reply, Settings, in_order
from megalite.inference.source import Source, open_source
from megalite.launch.arguments import Parser
from megalite.run import together
from megalite.run.agree import paths_report
from megalite.text.rows import decode, filled_lines, kind, parse_json, text_fault

if TYPE_CHECKING:
    from megalite.engine.engine import Stage
    from megalite.parallel.groups import World

WEEK_S = 7 * 24 * 3600.0


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("model", help="run folder, one of its checkpoints/step-NNNNNNNN, or a Hugging Face folder")
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be repeated")
    add("--prompts", metavar="FILE", help='more prompts: one a line, or *.jsonl with {"prompt": ...}')
    add("--chat", nargs="?", const="", metavar="TEXT", help="answer TEXT by the chat template; without TEXT: converse")
    add("--system", metavar="TEXT", help="system message of --chat")
    add("--template", metavar="NAME", help="chat template: built-in name or .jinja file (default: the tokenizer's own)")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="(default: %(default)s)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default: %(default)s)")
    add("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens; 0: all")
    add("--top-p", type=float, default=0.95, metavar="P", help="keep the likeliest that reach P (default: %(default)s)")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: seen tokens become less likely")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--seed", type=int, default=0, help="prompt i draws with seed + i")
    add("--tp", type=int, help="tensor-parallel ranks (default: as many as there are, if they cut the model)")
    add("--pp", type=int, help="pipeline stages")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--dtype", choices=["fp32", "bf16", "fp16", "fp64"], help="of weights and activations (default: the model's)")
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
            raise ValueError("--chat answers one message or converses; leave out --prompt and --prompts")
        source = open_source(
            options.model,
            tp=options.tp,
            pp=options.pp,
            world_size=together.WORLD_SIZE,
            device=options.device,
            dtype=options.dtype,
            # the ranks that wait for a line to be typed must not run into a time limit
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
    """One prompt a line, or under "prompt" of each row of a *.jsonl file."""
    if not path.is_file():
        raise ValueError(f"--prompts {path}: no such file; write one prompt a line into it, or ask with --prompt TEXT")
    found = []
    for where, raw in filled_lines(path):
        try:
            found.append(_prompt(raw, is_json=kind(path) in (".jsonl", ".json")))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not found:
        raise ValueError(f"{path}: holds no prompt; write one a line")
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
    """What is to follow `prompt`: its continuation, or the answer of the chat."""
    if fault := text_fault(prompt):
        raise ValueError(f"the prompt {fault}")
    ids = [*source.start, *source.tokenizer.encode(prompt)] if chat is None else chat.ask(prompt)
    return Reply(source.tokenizer, ids, settings, source.stops, source.limit)


def show(stage: "Stage", prompts: Sequence[str], replies: Sequence[Reply], settings: Settings) -> None:
    """Print prompts and replies, one after the other, as they come."""
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
    """Continue or answer each line that is typed, until the end of input."""
    from megalite.inference.decode import share_text, stream

    for line in lines():
        line = share_text(line, stage.mesh.world, stage.mesh.device)
        if line is None:
            return
        try:
            answer = reply(source, chat, line, settings)
        except ValueError as error:
            write(f"error: {error}\n")
            if chat is not None:
                return  # it only grows
            continue
        for _, text in stream(stage, [answer], settings):
            write(text)
        if chat is not None:
            chat.answered(answer.text)
        write("\n")
        note(stage, [answer])


def lines() -> Iterator[str | None]:
    """What is typed, line by line, then None; on other ranks than the first None without end."""
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
    """Tell of replies that the context ended, and of those longer than what the model was trained on."""
    if together.RANK != 0:
        return
    trained = stage.config.train.seq_len
    if any(each.ended == "context end" for each in replies):
        print("note: stopped where the model's positions end", file=sys.stderr)
    elif any(len(each.prompt) + len(each.ids) > trained for each in replies):
        print(f"note: the model was trained on {trained} tokens; beyond it gets worse", file=sys.stderr)


if __name__ == "__main__":
    together.leave(main())
