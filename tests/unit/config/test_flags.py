"""Flags of other engines: every one of a command line is told at once, with the name here and its value."""

import re
from pathlib import Path

import pytest

from megalite.config import ConfigError, parse_command_line
from megalite.config.flags import SPECIAL, TABLE, _keys, _table
from megalite.config.parse import OPTIONS
from megalite.config.read import coerce, read_yaml_file
from megalite.config.schema import SECTIONS, hints_of


def told(*argv: str, preset: str = "llama2-7b") -> str:
    with pytest.raises(ConfigError) as error:
        parse_command_line(argv, default_preset=preset, prog="")
    assert "\n" not in str(error.value)
    return str(error.value)


def each(message: str) -> dict[str, str]:
    """Of each name what is said, of a message on several."""
    head, _, rest = message.partition("keys are set as key=value: ")
    parts = re.split(r"; (?=-{0,2}[\w.-]+: )", rest)
    assert f"{len(parts)} unknown flags or keys" in head
    return dict(part.split(": ", 1) for part in parts)


# as they stand in the documentation of each
MEGATRON = (
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --num-layers 32 --num-attention-heads 32 "
    "--group-query-attention --num-query-groups 8 --seq-length 4096 --max-position-embeddings 4096 "
    "--micro-batch-size 1 --global-batch-size 256 --train-iters 1000 --lr-decay-iters 900 --lr-decay-style cosine "
    "--lr-warmup-fraction .01 --adam-beta2 0.98 --bf16 --log-interval 10 --save-interval 100 --eval-iters 10 --save "
    "runs/x --load runs/y --split 949,50,1 --use-distributed-optimizer --swiglu "
    "--untie-embeddings-and-output-weights --disable-bias-linear --no-position-embedding --normalization RMSNorm "
    "--distributed-timeout-minutes 5 --rampup-batch-size 16 16 1000 --tokenizer-model t.model --data-path a "
    "--fp8-format hybrid --num-virtual-stages-per-pipeline-rank 2 --num-layers-per-virtual-pipeline-stage 4 "
    "--recompute-granularity selective"
)
EXPECTED = {
    "--tensor-model-parallel-size": "parallel.tp=2",
    "--pipeline-model-parallel-size": "parallel.pp=4",
    "--num-layers": "model.num_layers=32",
    "--num-attention-heads": "model.num_heads=32",
    "--group-query-attention": "leave it out: model.num_kv_heads says it",
    "--num-query-groups": "model.num_kv_heads=8",
    "--seq-length": "train.seq_len=4096",
    "--max-position-embeddings": "model.max_positions=4096",
    "--micro-batch-size": "train.micro_batch_size=1",
    "--global-batch-size": "train.global_batch_size=256",
    "--train-iters": "train.steps=1000",
    "--lr-decay-iters": "optim.decay_samples=230400",
    "--lr-decay-style": "optim.lr_schedule=cosine",
    "--lr-warmup-fraction": "optim.warmup_samples=2560",
    "--adam-beta2": "optim.beta2=0.98",
    "--bf16": "train.dtype=bf16",
    "--log-interval": "log.interval=10",
    "--save-interval": "checkpoint.interval=100",
    "--eval-iters": "train.eval_samples=2560",
    "--save": "train.run_dir=runs/x",
    "--load": "checkpoint.load=runs/y",
    "--split": "data.valid_fraction=0.051, held out from the end",
    "--use-distributed-optimizer": "parallel.zero=1",
    "--swiglu": "model.activation=swiglu",
    "--untie-embeddings-and-output-weights": "model.tie_embeddings=false",
    "--disable-bias-linear": "model.linear_bias=false",
    "--no-position-embedding": "model.position=rope",
    "--normalization": "model.norm=rmsnorm",
    "--distributed-timeout-minutes": "parallel.timeout_s=300",
    "--rampup-batch-size": "train.ramp_start=16 train.ramp_samples=1000; it grows by micro_batch_size x dp",
    "--tokenizer-model": "data.tokenizer=t.model",
    "--data-path": "data.path=a",
    "--fp8-format": "fp8 is not supported; use train.dtype=bf16",
    "--num-virtual-stages-per-pipeline-rank": "parallel.chunks=2",
    "--num-layers-per-virtual-pipeline-stage": "not supported: the stages on each rank are counted, not the layers on "
    "each stage; use parallel.schedule=interleaved with parallel.chunks=2 or more",
    "--recompute-granularity": "parallel.recompute=selective",
}


def test_a_command_line_of_megatron() -> None:
    assert each(told(*MEGATRON.split())) == EXPECTED


def test_the_same_with_underscores_and_equals_signs() -> None:
    words = []
    for flag, *values in (part.split() for part in re.split(r" (?=--)", MEGATRON)):
        flag = flag.replace("-", "_").replace("__", "--", 1)
        words += [f"{flag}={values[0]}"] if len(values) == 1 else [flag, *values]
    found = each(told(*words))
    assert {name.replace("_", "-"): said for name, said in found.items()} == EXPECTED


LLAMA_FACTORY = """
model_name_or_path: base
stage: sft
do_train: true
finetuning_type: lora
lora_target: q_proj,v_proj
deepspeed: ds.json
dataset: chats.jsonl
cutoff_len: 2048
output_dir: saves/x
logging_steps: 10
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
fp16: false
resume_from_checkpoint: null
val_size: 0.1
eval_steps: 50
quantization_bit: 4
report_to: none
"""


def test_a_file_of_llama_factory(tmp_path: Path) -> None:
    (tmp_path / "lf.yaml").write_text(LLAMA_FACTORY)
    message = told("--config", str(tmp_path / "lf.yaml"))
    assert message.startswith(f"{tmp_path}/lf.yaml: 23 unknown flags or keys")
    found = each(message)
    assert found["model_name_or_path"] == "model.from_hf=base"
    assert found["lora_target"] == 'tune.lora_targets="q_proj v_proj"'
    assert found["finetuning_type"] == "tune.mode=lora"
    assert found["gradient_accumulation_steps"] == "train.global_batch_size, as 8 x 2 x parallel.dp"
    # neither the steps nor the batch are known, and the preset's are not meant
    assert found["warmup_ratio"] == "optim.warmup_samples, as 0.1 x train.steps x train.global_batch_size"
    assert (found["bf16"], found["fp16"]) == ("train.dtype=bf16", "leave it out: it is off unless it is set")
    assert found["resume_from_checkpoint"] == "leave it out: nothing is set"
    assert found["val_size"] == "data.valid_fraction=0.1"
    assert found["eval_steps"] == "train.eval_interval=50"
    for name in ("deepspeed", "quantization_bit", "report_to"):
        assert "not supported" in found[name]


def test_files_of_nanotron_torchtitan_and_axolotl(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "parallelism: {dp: 8, tp: 2, pp_engine: 1f1b}\n"
        "tokens: {micro_batch_size: 2, sequence_length: 256, train_steps: 15, batch_accumulation_per_replica: 4}\n"
        "optimizer: {zero_stage: 1, learning_rate_scheduler: {learning_rate: 3e-4, lr_warmup_steps: 2}}\n"
        "training: {local_batch_size: 2, seq_len: 512}\n"
        "datasets:\n  - path: a\n    type: alpaca\n"
        "base_model: x\n"
    )
    found = each(told("--config", str(tmp_path / "x.yaml"), "--job.dump_folder", "out", "train.steps=3"))
    assert found == {
        "parallelism.dp": "parallel.dp=8",
        "parallelism.tp": "parallel.tp=2",
        "parallelism.pp_engine": "parallel.schedule=1f1b",
        "tokens.micro_batch_size": "train.micro_batch_size=2",
        "tokens.sequence_length": "train.seq_len=256",
        "tokens.train_steps": "train.steps=15",
        "tokens.batch_accumulation_per_replica": "train.global_batch_size=64",
        "optimizer.zero_stage": "parallel.zero=1",
        "optimizer.learning_rate_scheduler.learning_rate": "optim.lr=3e-4",
        "optimizer.learning_rate_scheduler.lr_warmup_steps": "optim.warmup_samples=128",
        "training.local_batch_size": "train.micro_batch_size=2",
        "training.seq_len": "train.seq_len=512",
        "datasets": "data.sft=...",
        "base_model": "model.from_hf=x",
        "--job.dump_folder": "train.run_dir=out",
    }


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--val_size", "0.1"], "unknown flag --val_size; here it is data.valid_fraction=0.1; keys are set as"),
        (["val_size=0.1"], "unknown key val_size; here it is data.valid_fraction=0.1"),
        (["--val-size=500"], "data.valid_fraction, a share of the rows: 500 / rows"),
        (["--eval_steps", "50"], "train.eval_interval=50"),
        (["--log-interval=3"], "log.interval=3"),
        (["--logging_steps", "3"], "log.interval=3"),
        (["--gradient_accumulation_steps=4", "parallel.dp=2"], "train.global_batch_size=8"),
        (["--lr-warmup-iters", "100"], "optim.warmup_samples=102400"),
        (["--lr-warmup-iters", "100", "train.global_batch_size=64"], "optim.warmup_samples=6400"),
        (["--warmup_ratio", "0.5", "train.steps=10", "train.global_batch_size=64"], "optim.warmup_samples=320"),
        (["--train-samples", "102400"], "train.steps=100"),
        (["--min-lr-ratio", "0.1", "optim.lr=1e-3"], "optim.min_lr=0.0001"),
        (["--use-distributed-optimizer"], "parallel.zero=1"),
        (["--zero_stage", "3"], "parallel.zero=0 or 1; 3 is not supported"),
        (["--resume_from_checkpoint", "true"], "checkpoint.resume=auto"),
        (["--resume_from_checkpoint", "runs/x"], "checkpoint.load=runs/x"),
        (["--deepspeed", "ds.json"], "DeepSpeed's engine are not supported; use parallel.zero=1"),
        (["--report_to", "wandb"], "other trackers are not supported"),
        (["--load_in_4bit"], "training on quantized weights is not supported; use tune.mode=lora"),
        (["--bf16"], "train.dtype=bf16"),
        (["--bf16=False"], "leave it out: it is off unless it is set"),
        (["--no-bf16"], "leave it out"),
        (["--no-sequence-parallel"], "parallel.sp=false"),
        (["--gradient_checkpointing", "false"], "parallel.recompute=none"),
        (["--train_on_inputs", "true"], "data.train_on=all"),
        (["--torch_dtype", "bfloat16"], "train.dtype=bf16"),
        (["--optim", "adamw_torch"], "optim.name=adamw"),
        (["--optim", "lion"], "optim.name=adamw or apex_adamw or muon; lion is not supported"),
        (["--lr=1e-3"], "optim.lr=1e-3"),
        (["--interval", "3"], "here it is checkpoint.interval or log.interval"),
        (["--data-path", "0.3", "a", "0.7", "b"], "blends are not supported"),
        (["--stages", "2", "2"], "parallel.stages=2,2"),
        (["-tp", "2"], "unknown flag -tp; here it is parallel.tp=2"),
        (["--lora_target", "all"], "tune.lora_targets="),
        (["--LR", "1"], "optim.lr=1"),
        (["--moe-some-new-option", "3"], "mixture of experts is not supported"),
        (["--dataloader_prefetch_factor=2"], "leave it out: it changes no number here"),
    ],
)  # fmt: skip
def test_flags(argv: list[str], words: str) -> None:
    assert words in told(*argv)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("--zzz", "unknown flag --zzz; --help lists every key"),
        ("--nonsense-flag", "--help lists every key"),
        ("--foo-bar-baz-size", "--help lists every key"),
        ("train.x=1", "unknown key train.x; --help lists every key"),
        ("model.colour=1", "--help lists every key"),
        ("--tensor-model-paralel-size", "did you mean tensor_model_parallel_size? here it is parallel.tp=..."),
        ("model.hidden=3", "did you mean model.hidden_size?"),
        ("train=3", "unknown key train; it is a section; write e.g. train.run_dir=..."),
    ],
)
def test_a_near_name_is_offered_only_where_it_is_near(name: str, words: str) -> None:
    assert words in told(name)


def test_values_of_flags_are_not_taken_for_keys() -> None:
    found = each(told("--foo", "1", "--bar=a=b", "--no-such", "train.steps=3", "--dry-run"))
    assert list(found) == ["--foo", "--bar", "--no-such"]


def test_the_table_names_keys_that_exist_and_values_that_they_take() -> None:
    assert len(_table()) > 500
    for name, rows in _table().items():
        assert name == name.lower().replace("-", "_"), name
        assert name not in OPTIONS
        for kind, text in rows:
            if kind in ("same", "product", "value"):
                keys = [text.split()[0]]
            else:
                keys = re.findall(r"[a-z]+\.[a-z]\w+(?==)", text) if kind == "switch" else []
            for key in keys:
                section, last = key.split(".")
                assert last in hints_of(SECTIONS[section]), (name, key)
            if kind in ("switch", "value"):
                pairs = re.findall(r"([a-z]+\.\w+)=([^ |]+)", text) if kind == "switch" else []
                if kind == "value":
                    pairs = [(text.split()[0], pair.split("=")[1]) for pair in text.split()[1:]]
                for key, value in pairs:
                    section, last = key.split(".")
                    choices = next(
                        f.metadata["choices"] for f in SECTIONS[section].__dataclass_fields__.values() if f.name == last
                    )
                    coerce(key, value, hints_of(SECTIONS[section])[last], choices)
            if kind == "product":
                words = text.split(" = ")[1].split()
                for factor in words[1::2]:
                    assert factor.isdigit() or factor.split(".")[1] in hints_of(SECTIONS[factor.split(".")[0]]), text
        # a switch may be a key of one value too, and nothing else may be two things
        assert len(rows) == 1 or {kind for kind, _ in rows} == {"switch", "same"}, name


def test_no_flag_hides_a_key_of_the_same_name() -> None:
    """A name that is a key's own stands in the table only where it says the same."""
    for name in set(_table()) & set(_keys()):
        for kind, text in _table()[name]:
            assert kind in ("switch", "value") or text in _keys()[name], (name, text)
    assert not set(SPECIAL) & set(_table())


def test_every_reason_reads_as_a_sentence() -> None:
    for reason in read_yaml_file(TABLE)["refused"]:
        assert not reason.endswith(".")
        assert len(reason) < 150
