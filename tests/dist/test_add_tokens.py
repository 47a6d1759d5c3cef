"""model.add_tokens: a vocabulary that grows at any topology, is saved, resumed and exported."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from ranks import finetune, pretrain, run_ranks, whole_tensors

from megalite.checkpoint.folder import latest
from megalite.data.new_tokenizer import new_tokenizer
from megalite.data.preprocess import preprocess
from megalite.text.tokenizer import load_tokenizer
from megalite.watch.metrics import read_metrics

SHAPE = ["model.vocab_size=400", "model.hidden_size=32", "model.num_layers=2", "model.ffn_hidden_size=64"]
LOOP = ["train.seq_len=32", "train.micro_batch_size=2", "train.global_batch_size=4", "train.device=cpu"]
LOOP += ["log.plot=false", "optim.warmup_samples=0", "optim.decay_samples=40"]
ADD = "model.add_tokens=[<|im_start|>, <|im_end|>]"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of its own tokenizer, which knows no chat, and a file of chats."""
    folder = tmp_path_factory.mktemp("made")
    rows = [f"verse {i} of the king and chapter {i * i} of the earth" for i in range(300)]
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    tokenizer = new_tokenizer([folder / "c.jsonl"], folder / "tokenizer", 400)
    preprocess([folder / "c.jsonl"], folder / "c", tokenizer, append_eod=True)
    argv = [f"data.path={folder / 'c'}_text_document", f"data.tokenizer={folder / 'tokenizer'}", "train.steps=2"]
    run_ranks(1, pretrain, [*SHAPE, *LOOP, *argv, f"train.run_dir={folder / 'run'}"])
    assert (folder / "run" / "tokenizer.model").is_file()
    chats = [
        {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": f"the king {i}"}]}
        for i in range(40)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    return folder


def sft(made: Path, run_dir: Path) -> list[str]:
    argv = [f"data.sft={made / 'chats.jsonl'}", "data.template=chatml", "data.valid_fraction=0"]
    argv += [f"checkpoint.load={made / 'run'}", "checkpoint.load_optim=false", f"train.run_dir={run_dir}"]
    return [*SHAPE, *LOOP, *argv, f"data.cache_dir={made / 'cache'}"]


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir)["train"]]


def test_new_rows_at_any_topology_saved_resumed_and_exported(made: Path, tmp_path: Path) -> None:
    one, four = tmp_path / "one", tmp_path / "four"
    run_ranks(1, finetune, [*sft(made, one), ADD, "train.steps=3", "parallel.tp=1", "parallel.pp=1"])
    split = ["parallel.tp=2", "parallel.pp=2"]
    run_ranks(4, finetune, [*sft(made, four), ADD, *split, "train.steps=2"])
    out = tmp_path / "hf"
    run_ranks(4, finetune, [*sft(made, four), ADD, *split, "train.steps=3", f"train.export_hf={out}"])
    assert losses(four) == pytest.approx(losses(one), rel=1e-5)
    # the run's own tokenizer has them, and so has what transformers opens
    tokenizer = load_tokenizer(four)
    assert [tokenizer.controls[token] for token in ("<|im_start|>", "<|im_end|>")] == [400, 401]
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    text = theirs.apply_chat_template([{"role": "user", "content": "hi  you"}], tokenize=False)
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode_chat(text).ids
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == 402
    assert (
        tokenizer.controls["<|im_end|>"] in model.generation_config.eos_token_id
    )  # where transformers' generate stops
    newest = latest(four)
    assert newest is not None
    weights = whole_tensors(newest)
    assert torch.equal(model.get_input_embeddings().weight, weights["weight.embed.weight"])
    # a run from this one has them without asking, and another token beside them
    further = [*sft(made, tmp_path / "further"), "train.steps=1", "parallel.tp=1", "parallel.pp=1"]
    further = [each.replace(f"checkpoint.load={made / 'run'}", f"checkpoint.load={four}") for each in further]
    further = [each.replace("vocab_size=400", "vocab_size=402") for each in further]
    run_ranks(1, finetune, [*further, "model.add_tokens=[<|tool|>]"])
    assert load_tokenizer(tmp_path / "further").controls["<|tool|>"] == 402


def test_new_rows_are_the_mean_of_the_others(made: Path, tmp_path: Path) -> None:
    argv = [*sft(made, tmp_path / "run"), ADD, "train.steps=1", "optim.lr=1e-9", "optim.min_lr=1e-10"]
    run_ranks(2, finetune, [*argv, "parallel.tp=2", "parallel.pp=1"])
    before, after = (latest(folder) for folder in (made / "run", tmp_path / "run"))
    assert before is not None
    assert after is not None
    old, new = whole_tensors(before), whole_tensors(after)
    for name in ("weight.embed.weight", "weight.loss_head.head.weight"):
        assert torch.allclose(new[name][:400], old[name], atol=1e-7)
        mean = old[name].double().mean(0).float()
        assert torch.allclose(new[name][400:], mean.expand(2, -1), atol=1e-7)


def test_from_a_hugging_face_folder(made: Path, tmp_path: Path) -> None:
    argv = [*sft(made, tmp_path / "a"), ADD, "train.steps=1", f"train.export_hf={tmp_path / 'hf'}"]
    run_ranks(1, finetune, [*argv, "parallel.tp=1", "parallel.pp=1"])
    argv = [*LOOP, f"model.from_hf={tmp_path / 'hf'}", f"data.sft={made / 'chats.jsonl'}", "data.valid_fraction=0"]
    argv += ["model.add_tokens=[<|tool|>]", "train.steps=2", f"data.cache_dir={made / 'cache'}", "parallel.pp=1"]
    for ranks in (1, 2):
        out = [f"train.run_dir={tmp_path / str(ranks)}", f"train.export_hf={tmp_path / f'out{ranks}'}"]
        run_ranks(ranks, finetune, [*argv, *out, f"parallel.tp={ranks}"])
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), rel=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out2")
    assert tokenizer.convert_tokens_to_ids("<|tool|>") == 402
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out2").config.vocab_size == 403


def test_what_is_refused(made: Path, tmp_path: Path) -> None:
    common = [*sft(made, tmp_path / "run"), "train.steps=4"]
    one = ["parallel.tp=1", "parallel.pp=1"]
    for argv, words in (
        ([*common, *one], "are not tokens of the tokenizer"),
        ([*common, *one, ADD, "checkpoint.load_optim=true"], "checkpoint.load_optim=false"),
        ([*common, *one, ADD, "tune.mode=lora"], "tune.mode=lora does not train the embeddings"),
        ([*common, *one, "model.add_tokens=[' a']"], "begins or ends with a space"),
        ([*common, *one, "model.add_tokens=[a, a]"], "a token is listed twice"),
    ):
        assert_refused(argv, words)
    run_ranks(1, finetune, [*common[:-1], "train.steps=1", *one, ADD])
    assert_refused([*common, *one, "model.add_tokens=[<|im_start|>, <|im_end|>, <x>]"], "another model|add_tokens=")


def assert_refused(argv: list[str], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        run_ranks(1, finetune, argv)
