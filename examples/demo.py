"""`make demo`: from raw text to sampled text on a CPU, with the commands a user would type, in under five minutes."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalite.data.corpus import Corpus, prepare
from megalite.data.indexed import IndexedDataset
from megalite.data.ngram import Baseline, KneserNeyBigram, Unigram, total_nats
from megalite.watch.metrics import read_metrics
from megalite.watch.plot import plot_losses

HERE = Path(__file__).resolve().parent
RUN = Path("runs/demo")
VOCAB_SIZE = 600
PROMPTS = {"en": "And the LORD said unto ", "zh": "春"}
LANGUAGES = {"en": "English (King James Bible)", "zh": "Chinese (Tang and Song poems)"}


def heading(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def shell(command: list[str]) -> None:
    """Run a command of the project the way a user would, after showing it."""
    shown = ["python" if word == sys.executable else Path(word).name if "/bin/" in word else word for word in command]
    print("$ " + " ".join(f'"{word}"' if " " in word else word for word in shown), flush=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(status)


def baselines(corpus: Corpus) -> dict[str, dict[str, float]]:
    """Nats per token of n-gram models fitted on the whole training split, on each held-out set."""
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


def last_screen(corpus: Corpus, reference: dict[str, dict[str, float]], seconds: float) -> bool:
    """Print how the model compares; whether it beats every baseline in every language."""
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
    print("The model beats both n-grams in both languages." if beaten else "The model does NOT beat every n-gram.")
    speeds = sorted(row["tokens_per_s"] for row in metrics["train"])
    print(
        f"\n{len(speeds)} steps at {speeds[len(speeds) // 2]:,.0f} tokens/s (median) on 4 ranks: "
        f"tensor parallel 2 x pipeline parallel 2"
    )
    print(f"checkpoint  {max((RUN / 'checkpoints').glob('step-*'))}")
    print(f"plot        {RUN / 'loss.png'}")
    print(f"samples     {RUN / 'samples.txt'}")
    print(f"took        {seconds:.0f} s")
    return beaten


def main() -> int:
    began = time.monotonic()
    heading("1. Tokenizer and data: 4.3 MB of English and Chinese")
    corpus = prepare(HERE / "corpus", ".cache/megalite", VOCAB_SIZE)
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
    return 0 if last_screen(corpus, reference, time.monotonic() - began) else 1


if __name__ == "__main__":
    sys.exit(main())
