"""Users' mistakes: what is printed for each, and how soon.

python benchmarks/wrong_inputs.py      writes results/wrong-inputs.md
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalite.data.indexed import IndexedWriter

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN = ["examples/pretrain_7b.py", "--preset", "tiny"]
ONE = [*PRETRAIN, "parallel.tp=1", "parallel.pp=1", "train.steps=2"]
SFT = ["examples/sft_7b.py", "--preset", "tiny", "parallel.tp=1", "parallel.pp=1", "train.steps=2"]
CHATS = [*SFT, "data.sft={work}/chats.jsonl", "data.tokenizer={work}/run/tokenizer.model"]
LORA = [*ONE, "tune.mode=lora", "checkpoint.load={work}/run"]
DATA = ["tools/data.py", "inspect-sft", "--tokenizer", "{work}/run/tokenizer.model"]
GENERATE = ["tools/generate.py", "{work}/run", "--prompt", "x"]
EVALUATE, CHECKPOINT = "tools/evaluate.py", "tools/checkpoint.py"
PREPROCESS = [
    "tools/preprocess_data.py",
    "--tokenizer-model",
    "{work}/run/tokenizer.model",
    "--output-prefix",
    "{work}/out",
]

# (kind, what is wrong, arguments of python, extra environment)
CASES: list[tuple[str, str, list[str], dict[str, str]]] = [
    ("config", "unknown key", [*PRETRAIN, "train.step=20"], {}),
    ("config", "key without section", [*PRETRAIN, "lr=1e-3"], {}),
    ("config", "no value", [*PRETRAIN, "train.steps"], {}),
    ("config", "text for a number", [*PRETRAIN, "train.steps=many"], {}),
    ("config", "octal", [*PRETRAIN, "train.steps=010"], {}),
    ("config", "sexagesimal", [*PRETRAIN, "train.steps=1:30"], {}),
    ("config", "no for a bool", [*PRETRAIN, "parallel.sp=no"], {}),
    ("config", "unknown choice", [*PRETRAIN, "train.dtype=float16"], {}),
    ("config", "unknown preset", ["examples/pretrain_7b.py", "--preset", "lama2-7b"], {}),
    ("config", "unknown flag", [*PRETRAIN, "--lr", "3"], {}),
    ("config", "file that is not there", [*PRETRAIN, "--config", "{work}/none.yaml"], {}),
    ("config", "key twice in YAML", [*PRETRAIN, "--config", "{work}/twice.yaml"], {}),
    ("config", "broken YAML", [*PRETRAIN, "--config", "{work}/broken.yaml"], {}),
    ("config", "negative learning rate", [*PRETRAIN, "optim.lr=-1"], {}),
    ("config", "min_lr above lr", [*PRETRAIN, "optim.lr=1e-5"], {}),
    ("topology", "tp does not divide the heads", [*PRETRAIN, "parallel.tp=3"], {}),
    ("topology", "more stages than layers", [*PRETRAIN, "parallel.pp=5", "parallel.tp=1"], {"WORLD_SIZE": "5"}),
    ("topology", "world size is not the product", [*PRETRAIN, "parallel.tp=2", "parallel.pp=2"], {"WORLD_SIZE": "6"}),
    ("topology", "no torchrun", [*PRETRAIN, "parallel.tp=2", "parallel.pp=2"], {}),
    ("topology", "stages do not add up", [*PRETRAIN, "parallel.stages=[1, 2]", "parallel.pp=2"], {"WORLD_SIZE": "2"}),
    ("topology", "microbatches do not divide", [*ONE, "train.global_batch_size=30"], {}),
    ("topology", "sequence not divisible under sp", [*PRETRAIN, "train.seq_len=127"], {"WORLD_SIZE": "4"}),
    ("topology", "heads do not fit kv heads", [*ONE, "model.num_kv_heads=3"], {}),
    ("topology", "context parallelism", [*ONE, "parallel.cp=2"], {"WORLD_SIZE": "2"}),
    ("topology", "7B without the memory", ["examples/pretrain_7b.py"], {"WORLD_SIZE": "8"}),
    ("data", "no data", ["examples/pretrain_7b.py", "--preset", "125m", "train.seq_len=64", "train.dtype=fp32"], {}),
    ("data", "path that is not there", [*ONE, "data.path={work}/none"], {}),
    ("data", ".bin cut short", [*ONE, "data.path={work}/short"], {}),
    ("data", ".idx of another kind", [*ONE, "data.path={work}/garbage"], {}),
    ("data", "empty", [*ONE, "data.path={work}/empty"], {}),
    ("data", "token id of a larger vocabulary", [*ONE, "data.path={work}/large"], {}),
    ("data", "bad JSON line", [*PREPROCESS, "--input", "{work}/bad.jsonl"], {}),
    ("data", "no input file", [*PREPROCESS, "--input", "{work}/none.jsonl"], {}),
    ("checkpoint", "of another model", [*ONE, "train.run_dir={work}/run", "model.hidden_size=256"], {}),
    ("checkpoint", "damaged shard", [*ONE, "train.run_dir={work}/damaged", "train.steps=4"], {}),
    ("checkpoint", "load from nowhere", [*ONE, "checkpoint.load={work}/none"], {}),
    ("checkpoint", "folder with other files", [*ONE, "train.run_dir={work}/other"], {}),
    ("checkpoint", "sample without a checkpoint", ["tools/generate.py", "{work}/other"], {}),
    ("instructions", "no such file", [*SFT, "data.sft=none.jsonl", "data.tokenizer={work}/run/tokenizer.model"], {}),
    ("instructions", "no tokenizer", [*SFT, "data.sft={work}/chats.jsonl"], {}),
    ("instructions", "no chat template", CHATS, {}),
    ("instructions", "misspelt template", [*CHATS, "data.template=chatlm"], {}),
    ("instructions", "whom to train on", [*CHATS, "data.template=plain", "data.train_on=user"], {}),
    (
        "instructions",
        "a row of an unknown role",
        [*CHATS, "data.template=plain", "data.sft={work}/role.jsonl"],
        {},
    ),
    ("instructions", "steps and epochs", [*CHATS, "data.template=plain", "train.epochs=1"], {}),
    ("instructions", "rows of another kind", [*DATA, "{work}/questions.jsonl", "--template", "plain"], {}),
    (
        "instructions",
        "a template that is no Jinja",
        [*DATA, "{work}/chats.jsonl", "--template", "{work}/broken.jinja"],
        {},
    ),
    ("instructions", "an empty file", [*DATA, "{work}/empty.jsonl", "--template", "plain"], {}),
    ("tune", "LoRA without a base", [*ONE, "tune.mode=lora"], {}),
    ("tune", "a rank without the mode", [*ONE, "tune.lora_rank=8"], {}),
    ("tune", "a target the model has not", [*LORA, "tune.lora_targets=c_attn"], {}),
    ("tune", "a name that freezes nothing", [*LORA, "tune.freeze=encoder.*"], {}),
    ("tune", "biases of a model without", [*ONE, "tune.mode=bitfit"], {}),
    ("tune", "unknown mode", [*ONE, "tune.mode=qlora"], {}),
    ("Hugging Face", "folder without weights", ["tools/generate.py", "{work}/bare", "--prompt", "x"], {}),
    ("Hugging Face", "folder that is not there", [*ONE, "model.from_hf={work}/none"], {}),
    ("Hugging Face", "another size asked for", [*ONE, "model.from_hf={work}/bare", "model.num_layers=7"], {}),
    ("Hugging Face", "a family that is not built", [*ONE, "model.from_hf={work}/mixtral"], {}),
    (
        "Hugging Face",
        "a run folder as a source",
        [CHECKPOINT, "convert", "--from", "hf", "{work}/run", "--to", "megalite", "{work}/x"],
        {},
    ),
    (
        "Hugging Face",
        "target that is not empty",
        [CHECKPOINT, "convert", "--from", "megalite", "{work}/run", "--to", "hf", "{work}/other"],
        {},
    ),
    (
        "Hugging Face",
        "unknown kind",
        [CHECKPOINT, "convert", "--from", "gguf", "{work}/x", "--to", "megalite", "{work}/y"],
        {},
    ),
    ("generate", "no such model", ["tools/generate.py", "{work}/none", "--prompt", "x"], {}),
    ("generate", "tp does not divide", [*GENERATE, "--tp", "3"], {"WORLD_SIZE": "3"}),
    ("generate", "no torchrun", [*GENERATE, "--tp", "2"], {}),
    ("generate", "chat without a template", [*GENERATE[:2], "--chat", "hi"], {}),
    ("generate", "chat and a prompt", [*GENERATE, "--chat", "hi"], {}),
    ("generate", "negative temperature", [*GENERATE, "--temperature", "-1"], {}),
    ("generate", "no file of prompts", [*GENERATE[:2], "--prompts", "{work}/none.txt"], {}),
    ("generate", "CUDA asked for, none here", [*GENERATE, "--device", "cuda"], {}),
    ("evaluate", "no verb", [EVALUATE, "{work}/run", "{work}/rows.jsonl"], {}),
    ("evaluate", "rows of another kind", [EVALUATE, "choices", "{work}/run", "{work}/questions.jsonl"], {}),
    ("evaluate", "more shots than rows", [EVALUATE, "answers", "{work}/run", "{work}/rows.jsonl", "--shots", "9"], {}),
    ("evaluate", "text of another suffix", [EVALUATE, "loss", "{work}/run", "{work}/text.md"], {}),
    ("evaluate", "no window", [EVALUATE, "loss", "{work}/run", "{work}/text.txt", "--seq-len", "0"], {}),
    ("checkpoint", "tool: no such run", [CHECKPOINT, "info", "{work}/none"], {}),
    ("checkpoint", "tool: no such tensor", [CHECKPOINT, "info", "{work}/run", "--tensors", "bias"], {}),
    ("checkpoint", "tool: keep none", [CHECKPOINT, "prune", "{work}/run", "--keep", "0"], {}),
    ("checkpoint", "tool: misspelt verb", [CHECKPOINT, "verfy", "{work}/run"], {}),
    ("environment", "CUDA asked for, none here", [*ONE, "train.device=cuda"], {}),
    ("environment", "disk or folder not writable", [*ONE, "train.run_dir=/proc/run"], {}),
]


def prepare(work: Path) -> None:
    """Create the files and runs that the cases need."""
    (work / "twice.yaml").write_text("train:\n  steps: 3\n  steps: 4\n")
    (work / "broken.yaml").write_text("train: {steps: 3\n")
    (work / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (work / "chats.jsonl").write_text('{"prompt": "Name a prime.", "completion": "7"}\n' * 9)
    (work / "role.jsonl").write_text('{"messages": [{"role": "robot", "content": "7"}]}\n')
    (work / "questions.jsonl").write_text('{"question": "Name a prime."}\n')
    (work / "rows.jsonl").write_text('{"prompt": "Name a prime.", "answer": "7"}\n' * 3)
    (work / "empty.jsonl").touch()
    (work / "broken.jinja").write_text("{{ messages")
    for name in ("text.md", "text.txt"):
        (work / name).write_text("In the beginning God created the heaven and the earth.\n")
    llama = {"model_type": "llama", "vocab_size": 600, "hidden_size": 128, "intermediate_size": 352}
    llama |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    for name, config in (("bare", llama), ("mixtral", llama | {"model_type": "mixtral"})):
        (work / name).mkdir()
        (work / name / "config.json").write_text(json.dumps(config))
    (work / "other").mkdir()
    (work / "other" / "thesis.tex").touch()
    for name, documents in (("short", [[1] * 100] * 50), ("empty", []), ("large", [[1, 2, 700]] * 500)):
        with IndexedWriter(work / name, vocab_size=1000) as writer:
            for document in documents:
                writer.add_document(document)
    with (work / "short.bin").open("r+b") as file:
        file.truncate(77)
    (work / "garbage.idx").write_bytes(os.urandom(100))
    (work / "garbage.bin").touch()
    command = [sys.executable, *ONE, f"train.run_dir={work / 'run'}", "train.eval_samples=8", "log.plot=false"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    shutil.copytree(work / "run", work / "damaged")
    for shard in work.glob("damaged/checkpoints/*/*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:1000])


def run(work: Path, arguments: list[str], environment: dict[str, str]) -> tuple[str, float, bool]:
    """(standard error, seconds, whether it failed with exactly one error line and no traceback)."""
    words = [word.replace("{work}", str(work)) for word in arguments]
    if words[0].startswith("examples/") and not any("run_dir" in word for word in words):
        words.append(f"train.run_dir={work / 'fresh'}")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    seconds = time.monotonic() - began
    printed = done.stderr.strip().replace(str(work), "WORK")
    good = done.returncode != 0 and "Traceback" not in done.stderr + done.stdout and printed.count("error:") == 1
    return printed, seconds, good


def main() -> int:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work)
        for kind, what, arguments, environment in CASES:
            printed, seconds, good = run(work, arguments, environment)
            rows.append((kind, what, printed, seconds, good))
            print(f"{'ok ' if good else 'BAD'} {seconds:5.2f} s  {kind}: {what}\n      {printed}", flush=True)
    lines = [
        f"# {len(rows)} wrong inputs\n",
        "`python benchmarks/wrong_inputs.py`. Seconds are for the whole process.\n",
    ]
    lines += ["| | what is wrong | what is printed | s |", "|---|---|---|---|"]
    for kind, what, printed, seconds, _ in rows:
        text = printed.replace("|", "\\|").replace("\n", "<br>")
        lines.append(f"| {kind} | {what} | {text} | {seconds:.2f} |")
    (ROOT / "benchmarks" / "results" / "wrong-inputs.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    bad = sum(not good for *_, good in rows)
    slow = sorted(seconds for *_, seconds, _ in rows)
    print(
        json.dumps(
            {"cases": len(rows), "bad": bad, "median_s": round(slow[len(slow) // 2], 2), "max_s": round(slow[-1], 2)}
        )
    )
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
