"""`make demo`: from raw text to a model that answers questions, on a CPU, with the commands a user would type.

Pretraining takes under five minutes on two cores, instruction tuning under three more.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalite.data.corpus import Corpus, prepare
from megalite.data.indexed import IndexedDataset
from megalite.data.ngram import Baseline, KneserNeyBigram, Unigram, total_nats
from megalite.data.questions import PHRASINGS, Questions, make_rows, prepare_questions
from megalite.inference.eval_rows import exact_match
from megalite.text.rows import nonblank_lines, parse_json
from megalite.watch.metrics import read_metrics
from megalite.watch.plot import plot_losses

HERE = Path(__file__).resolve().parent
RUN, TUNED = Path("runs/demo"), Path("runs/demo-sft")
CACHE = ".cache/megalite"
VOCAB_SIZE = 600
PROMPTS = {"en": "And the LORD said unto ", "zh": "春"}
LANGUAGES = {"en": "English (King James Bible)", "zh": "Chinese (Tang and Song poems)"}
# many small steps work better here than few large ones
SFT = [
    *("parallel.tp=1", "parallel.pp=1", "train.steps=1200", "train.global_batch_size=8", "train.micro_batch_size=4"),
    *("optim.lr=3e-3", "optim.min_lr=1e-4", "optim.warmup_samples=400", "train.eval_interval=0", "log.interval=100"),
    *("data.valid_fraction=0.005", "checkpoint.interval=0"),
]
SHOWN = ["--template", "plain", "--rows", "3", "--seq-len", "128", "--tokenizer"]
TASKS = {"book": "which book is this verse from", "poem": "the next line of a poem", "sum": "sums in words"}


def heading(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def shell(command: list[str]) -> None:
    """Print a command as a user would type it, and run it; exits with its status if it fails."""
    shown = ["python" if word == sys.executable else Path(word).name if "/bin/" in word else word for word in command]
    print("$ " + " ".join(f'"{word}"' if " " in word else word for word in shown), flush=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(status)


def baselines(corpus: Corpus) -> dict[str, dict[str, float]]:
    """Nats per token on each held-out set, by n-gram models fitted on the whole training split."""
    train = IndexedDataset(corpus.train)
    models: dict[str, Baseline] = {
        "unigram": Unigram(train, VOCAB_SIZE),
        "Kneser-Ney bigram": KneserNeyBigram(train, VOCAB_SIZE),
    }
    heldout = {language: IndexedDataset(prefix) for language, prefix in corpus.heldout.items()}
    return {
        name: {language: total_nats(model, data) / (data.num_tokens - 1) for language, data in heldout.items()}
        for name, model in models.items()
    }


def bits_per_byte(corpus: Corpus, language: str, nats_per_token: float) -> float:
    data = IndexedDataset(corpus.heldout[language])
    return nats_per_token * (data.num_tokens - 1) / math.log(2) / data.sidecar["text_bytes"]


def pretrained(corpus: Corpus, reference: dict[str, dict[str, float]]) -> bool:
    """Print the pretrained model's held-out losses; returns whether it beats every baseline in every language."""
    metrics = read_metrics(RUN)
    evals: dict[str, list[float]] = {language: [] for language in LANGUAGES}
    for row in metrics["eval"]:
        evals[row["name"]].append(row["bits_per_byte"])
    heading("Held-out text: bits per byte (lower is better)")
    names = [*reference]
    print(f"{'':32}{'at start':>10}" + "".join(f"{name:>20}" for name in names) + f"{'model at end':>15}")
    beaten = True
    for language, title in LANGUAGES.items():
        others = [bits_per_byte(corpus, language, reference[name][language]) for name in names]
        end = evals[language][-1]
        beaten &= all(end < other for other in others)
        print(f"{title:32}{evals[language][0]:>10.3f}" + "".join(f"{o:>20.3f}" for o in others) + f"{end:>15.3f}")
    result = "beats both n-gram models in both languages" if beaten else "does NOT beat every n-gram model"
    print(f"The model {result}.")
    speeds = sorted(row["tokens_per_s"] for row in metrics["train"])
    print(
        f"\n{len(speeds)} steps at {speeds[len(speeds) // 2]:,.0f} tokens/s (median) on 4 ranks: "
        f"tensor parallel 2 x pipeline parallel 2"
    )
    return beaten


def ask(model: Path, questions: Questions, target: Path) -> list[dict[str, Any]]:
    """The model's answers to the held-out questions, by tools/evaluate.py."""
    how = ["--chat", "--template", "plain", "--max-new-tokens", "48", "--batch-size", "48", "--json", str(target)]
    shell([sys.executable, "tools/evaluate.py", "answers", str(model), str(questions.heldout), *how])
    rows: list[dict[str, Any]] = json.loads(target.read_text(encoding="utf-8"))["rows"]
    return rows


def baseline(questions: Questions) -> dict[str, str]:
    """The most frequent answer in the training questions, by task."""
    counts: dict[str, Counter[str]] = {task: Counter() for task in PHRASINGS}
    for row in make_rows(HERE / "corpus")[0]:
        counts[row.task][row.answer] += 1
    return {task: count.most_common(1)[0][0] for task, count in counts.items()}


def tuned(before: list[dict[str, Any]], after: list[dict[str, Any]], questions: Questions) -> bool:
    """Print an answer per task and the scores before and after tuning; returns whether the answers improved."""
    rows = [parse_json(line.raw) for line in nonblank_lines(questions.heldout)]
    majority = baseline(questions)
    heading("Held-out questions: phrasings, chapters, poems and numbers that were not trained on")
    for task in PHRASINGS:
        number = next(number for number, row in enumerate(rows) if row["task"] == task)
        print(f"  question  {rows[number]['prompt']}")
        for when, answers in (("before", before), ("after", after)):
            print(f"  {when:9} {shorten(answers[number]['said'])}")
        print(f"  correct   {rows[number]['answer']}\n")
    print(f"{'exact match':32}{'rows':>6}{'majority answer':>18}{'before':>9}{'after':>8}")
    figures = []
    for task, title in {**TASKS, "": "all"}.items():
        chosen = [number for number, row in enumerate(rows) if task in ("", row["task"])]
        guesses = [exact_match(majority[rows[n]["task"]], [rows[n]["answer"]]) for n in chosen]
        figures = [mean(guesses), *(mean([answers[n]["exact_match"] for n in chosen]) for answers in (before, after))]
        print(f"{title:32}{len(chosen):>6}{figures[0]:>18.1%}{figures[1]:>9.1%}{figures[2]:>8.1%}")
    stopped = [mean([each["ended"] == "stop token" for each in answers]) for answers in (before, after)]
    print(f"{'answers that stop by themselves':32}{len(rows):>6}{'':>18}{stopped[0]:>9.1%}{stopped[1]:>8.1%}")
    return figures[2] > max(figures[:2]) and stopped[1] >= 0.95


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def shorten(text: str) -> str:
    line = text.replace("\n", " ")
    return line if len(line) <= 80 else line[:77] + "..."


def main() -> int:
    began = time.monotonic()
    heading("1. Tokenizer and data: 4.3 MB of English and Chinese")
    corpus = prepare(HERE / "corpus", CACHE, VOCAB_SIZE)
    side = json.loads(corpus.train.with_name(corpus.train.name + ".json").read_text())
    print(f"sentencepiece model of {VOCAB_SIZE} pieces, byte fallback: {corpus.tokenizer}")
    print(f"{side['documents']:,} documents, {side['tokens']:,} training tokens: {corpus.train}.bin, .idx")
    reference = baselines(corpus)

    heading("2. Pretraining over 4 ranks: tp 2 x pp 2, 1F1B, sequence parallel")
    torchrun = Path(sys.executable).with_name("torchrun")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    pretrain = ["examples/pretrain_7b.py", "--preset", "tiny", f"train.run_dir={RUN}"]
    shell([str(torchrun), "--nproc_per_node", "4", *pretrain])
    plot_losses(RUN, {f"{name}, {lang}": nats for name, by in reference.items() for lang, nats in by.items()})

    heading("3. Samples, from the checkpoint, with a KV cache")
    texts = []
    for prompt in PROMPTS.values():
        command = [sys.executable, "tools/generate.py", str(RUN), "--prompt", prompt, "--max-new-tokens", "100"]
        print(f'$ python tools/generate.py {RUN} --prompt "{prompt}"', flush=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout or done.stderr)
        texts.append(done.stdout)
    (RUN / "samples.txt").write_text("\n---\n".join(texts), encoding="utf-8")
    better = pretrained(corpus, reference)
    print(f"pretraining and samples took {time.monotonic() - began:.0f} s")

    tuning = time.monotonic()
    heading("4. Instruction tuning from that checkpoint, at another topology: 2 replicas of the whole model")
    questions = prepare_questions(HERE / "corpus", CACHE)
    shell([sys.executable, "tools/data.py", "inspect-sft", str(questions.train), *SHOWN, str(corpus.tokenizer)])
    sft = ["examples/sft_7b.py", "--preset", "tiny", f"checkpoint.load={RUN}", "checkpoint.load_optim=false"]
    shell([str(torchrun), "--nproc_per_node", "2", *sft, f"train.run_dir={TUNED}", *SFT])

    heading("5. The held-out questions, before and after")
    before = ask(RUN, questions, TUNED / "before.json")
    after = ask(TUNED, questions, TUNED / "after.json")
    better &= tuned(before, after, questions)

    for name, path in {
        "pretrained": max((RUN / "checkpoints").glob("step-*")),
        "tuned": max((TUNED / "checkpoints").glob("step-*")),
        "plots": f"{RUN / 'loss.png'} {TUNED / 'loss.png'}",
        "samples": RUN / "samples.txt",
    }.items():
        print(f"{name:12}{path}")
    print(f"time        {tuning - began:.0f} s, and {time.monotonic() - tuning:.0f} s for tuning")
    print(f"try it      python tools/generate.py {TUNED} --chat")
    return 0 if better else 1


if __name__ == "__main__":
    sys.exit(main())
