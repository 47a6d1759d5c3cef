"""What is trained, on real ranks: the frozen stays to the bit, held-out loss falls, and a run goes on from itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import different, pretrain, refused, run_ranks, whole_tensors

from megalite.checkpoint.folder import read_manifest
from megalite.watch.metrics import read_metrics

CUT = {
    "single": (1, []),
    "tp2pp2": (4, ["parallel.tp=2", "parallel.pp=2"]),
    "dp2zero": (2, ["parallel.dp=2", "parallel.zero=1"]),
    "bf16": (4, ["parallel.tp=2", "parallel.dp=2", "parallel.zero=1", "train.dtype=bf16"]),
}
MODEL = ["model.linear_bias=true", "model.num_kv_heads=2"]
LORA = ["tune.mode=lora", "tune.lora_rank=4", "tune.lora_alpha=8", "tune.lora_dropout=0.1"]
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(settings, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains at `topology` to `steps`, in a new folder or in `run_dir`."""

    def _train(topology: str, steps: int, *more: str, run_dir: Path | None = None) -> Path:
        ranks, cuts = CUT[topology]
        folder = run_dir or tmp_path_factory.mktemp("run")
        run_ranks(ranks, pretrain, settings(folder, *MODEL, *cuts, f"train.steps={steps}", *more))
        return folder

    return _train


@pytest.fixture(scope="module")
def base(train: Train) -> Path:
    return train("single", 15)


def newest(run_dir: Path) -> dict:
    (folder,) = (run_dir / "checkpoints").glob("step-*")
    return whole_tensors(folder)


def weights(run_dir: Path) -> dict:
    return {name.removeprefix("weight."): x for name, x in newest(run_dir).items() if name.startswith("weight.")}


def curve(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir)["train"]]


@pytest.mark.parametrize(
    ("topology", "tune", "trained"),
    [
        ("tp2pp2", ["tune.mode=bitfit"], lambda name: name.endswith(".bias")),
        ("dp2zero", ["tune.mode=ffn_only"], lambda name: ".mlp." in name),
        # the first stage trains nothing
        ("tp2pp2", ["tune.freeze=embed.* layers.0.*"], lambda name: not name.startswith(("embed.", "layers.0."))),
        ("bf16", ["tune.mode=ffn_only", "tune.freeze=layers.0.*"], lambda name: name.startswith("layers.1.mlp.")),
    ],
    ids=["bitfit", "ffn_only", "freeze", "bf16"],
)
def test_what_is_frozen_stays_to_the_bit(
    train: Train, base: Path, topology: str, tune: list[str], trained: Callable[[str], bool]
) -> None:
    run_dir = train(
        topology,
        10,
        *tune,
        f"checkpoint.load={base}",
        "checkpoint.load_optim=false",
        "optim.warmup_samples=0",
    )
    before, after = weights(base), weights(run_dir)
    if topology == "bf16":
        before = {name: x.bfloat16() for name, x in before.items()}
    names = set(before)
    assert names == set(after)
    assert {name for name in names if not before[name].equal(after[name])} == {name for name in names if trained(name)}
    moments = {
        name.split(".", 1)[1] for name in newest(run_dir) if name.startswith(("exp_avg.", "exp_avg_sq.", "master."))
    }
    assert moments == {name for name in names if trained(name)}
    heldout = [row["loss"] for row in read_metrics(run_dir)["eval"]]
    assert heldout[-1] < heldout[0]


def test_lora(settings, train: Train, base: Path, tmp_path: Path) -> None:
    """Its curve at three topologies, its checkpoint, and a resume that changes no bit."""
    lora = [*LORA, f"checkpoint.load={base}", "optim.lr=1e-2", "optim.warmup_samples=0"]
    whole, cut = train("single", 20, *lora), train("tp2pp2", 20, *lora)
    assert max(abs(a - b) / b for a, b in zip(curve(cut), curve(whole), strict=True)) <= 1e-5
    heldout = [row["loss"] for row in read_metrics(cut)["eval"]]
    assert heldout[0] == pytest.approx(read_metrics(base)["eval"][-1]["loss"], rel=1e-5)
    assert heldout[-1] < heldout[0]
    found = newest(cut)
    assert {name.split(".")[0] for name in found} == {"weight", "exp_avg", "exp_avg_sq"}
    assert all(".lora_" in name for name in found)
    assert len(found) == 3 * 2 * 2 * 7

    half = train("tp2pp2", 10, *lora)
    assert curve(half) == curve(cut)[:10]
    train("tp2pp2", 20, *lora, run_dir=half)
    assert curve(half) == curve(cut)
    last = "step-00000020"
    assert different(whole_tensors(half / "checkpoints" / last), whole_tensors(cut / "checkpoints" / last)) == []

    # gone on from at another topology, the base found by what the adapter says of it
    onward = train("dp2zero", 22, *LORA, f"checkpoint.load={cut}", "optim.lr=1e-2", "optim.warmup_samples=0")
    straight = train("tp2pp2", 22, *lora)
    assert curve(onward) == pytest.approx(curve(straight)[20:], rel=1e-5)
    assert read_manifest(onward / "checkpoints" / "step-00000022")["base"].endswith("step-00000015")

    more = [*MODEL, "train.steps=30"]
    refused(settings(cut, *more, *lora, "tune.lora_alpha=4"), "holds adapters of tune.lora_alpha=8.0, not 4.0", ranks=1)
    refused(settings(cut, *more), "holds LoRA factors only, tune.mode=full", ranks=1)
    full = (f"checkpoint.load={cut}", "tune.mode=full")
    refused(settings(tmp_path, *more, *full), "holds LoRA factors only", ranks=1)
    refused(settings(base, *more, *lora), "holds whole weights, tune.mode=lora writes adapters", ranks=1)
    refused(settings(tmp_path, *more, *LORA), "name it with checkpoint.load=RUN or model.from_hf=DIR", ranks=1)


def test_lora_beside_a_hugging_face_folder(settings, text: Path, tmp_path: Path) -> None:
    """From a folder of Hugging Face's to a folder of merged weights, stopped and gone on between."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    there = {"vocab_size": 257, "intermediate_size": 64, "max_position_embeddings": 64, **sizes}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    source, run_dir, target = tmp_path / "source", tmp_path / "run", tmp_path / "merged"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**there, **ends)).save_pretrained(source)
    lora = [word for word in settings(run_dir, *LORA, "parallel.tp=2") if not word.startswith("model.")]
    lora += [f"model.from_hf={source}", "optim.lr=1e-2", "optim.warmup_samples=0"]
    run_ranks(2, pretrain, [*lora, "train.steps=5"])
    run_ranks(2, pretrain, [*lora, "train.steps=10", f"train.export_hf={target}"])

    heldout = [row["loss"] for row in read_metrics(run_dir)["eval"]]
    assert heldout[-1] < heldout[0]
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (source, target))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    losses = [row["loss"] for row in read_metrics(run_dir)["train"]]
    straight = tmp_path / "straight"
    run_ranks(2, pretrain, [*lora, "train.steps=10", f"train.run_dir={straight}"])
    assert losses == [row["loss"] for row in read_metrics(straight)["train"]]
