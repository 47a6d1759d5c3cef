"""A real model tuned on real conversations of two languages over real ranks, and what transformers makes of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from assets import asset
from ranks import finetune, run_ranks

from megalite.inference.chat import Chat
from megalite.inference.decode import load_stage, stream
from megalite.inference.reply import Reply, Settings
from megalite.inference.source import open_source
from megalite.parallel.groups import SoloWorld
from megalite.watch.metrics import read_metrics

transformers = pytest.importorskip("transformers")
QUESTIONS = ("Tell me a story about a cat.", "用一句话介绍北京。")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """The shortest rows of an English and a Chinese set: they fill two rows of 126 tokens, one batch."""
    both = []
    for name in ("alpaca_en_demo", "alpaca_zh_demo"):
        found = json.loads(asset(f"instructions/{name}.json").read_text(encoding="utf-8"))
        found = [row for row in found if row["output"]]
        both.append(sorted(found, key=lambda row: len(json.dumps(row)))[:2])
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for pair in zip(*both) for row in pair]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_tp3_and_pp2_learn_alike_and_transformers_says_the_same(rows: Path, tmp_path: Path) -> None:
    losses, export = {}, tmp_path / "export"
    for name, ranks, *more in (
        ("tp3", 3, "parallel.tp=3", "parallel.pp=1", "train.micro_batch_size=2", f"train.export_hf={export}"),
        ("pp2", 2, "parallel.tp=1", "parallel.pp=2", "train.micro_batch_size=1"),
    ):
        words = [f"model.from_hf={asset('smollm2')}", f"data.sft={rows}", f"data.cache_dir={tmp_path / 'cache'}"]
        words += ["data.valid_fraction=0", "train.seq_len=126", "train.steps=3"]
        words += ["train.global_batch_size=2", "train.eval_interval=0", "train.device=cpu", "train.threads=1"]
        words += ["train.dtype=fp32", "optim.lr=1e-5", "optim.min_lr=0", "optim.warmup_samples=0", "log.plot=false"]
        words += [*more, f"train.run_dir={tmp_path / name}"]
        ended = run_ranks(ranks, finetune, words, timeout_s=240.0)
        assert "4 Alpaca rows, template chat_template.jinja" in ended.out[0]
        assert "; 2 rows of 126" in ended.out[0]
        shutil.rmtree(tmp_path / name / "checkpoints")  # 1.6 GB
        losses[name] = [row["loss"] for row in read_metrics(tmp_path / name)["train"]]
    assert len(losses["tp3"]) == 3
    assert losses["tp3"] == pytest.approx(losses["pp2"], rel=1e-4)
    assert losses["tp3"][2] < losses["tp3"][1] < losses["tp3"][0]

    theirs = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    untrained = transformers.AutoModelForCausalLM.from_pretrained(asset("smollm2"), dtype=torch.float32)
    assert not torch.equal(theirs.model.layers[29].mlp.up_proj.weight, untrained.model.layers[29].mlp.up_proj.weight)
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    source = open_source(export, device="cpu")
    stage, settings = load_stage(source, SoloWorld()), Settings(12)
    for question in QUESTIONS:
        chat = Chat(source.tokenizer, None)
        ours = Reply(source.tokenizer, chat.ask(question), settings, source.stops | chat.stops, source.limit)
        for _ in stream(stage, [ours], settings):
            pass
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert prompt["input_ids"][0].tolist() == ours.prompt
        with torch.no_grad():
            said = theirs.generate(**prompt, max_new_tokens=12, do_sample=False)
        assert said[0, len(ours.prompt) :].tolist() == ours.ids
        assert len(ours.ids) == 12
