"""A LoRA run generates and scores as its merged weights do, in a run folder or a Hugging Face folder."""

import dataclasses
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from models import tiny

from megalite.checkpoint.save import save
from megalite.checkpoint.state import State
from megalite.config import Config, ParallelConfig, TrainConfig, TuneConfig, resolve, to_yaml
from megalite.data.corpus import train_tokenizer
from megalite.engine.engine import build
from megalite.exchange.adapter import merge_adapter
from megalite.exchange.base import name_of
from megalite.exchange.convert import to_hf_folder
from megalite.inference.decode import decode, load_stage
from megalite.inference.measure import log_likelihoods
from megalite.inference.reply import Settings
from megalite.inference.source import open_source
from megalite.model.init import draw
from megalite.parallel.groups import SoloWorld, World
from megalite.parallel.threads import run_threads

CORPUS = Path(__file__).parents[3] / "examples" / "corpus"
PROMPTS = ([5, 17, 3, 88], [9], [77, 30, 12])
NEW = 12
MODEL = tiny(vocab_size=400, tie_embeddings=True, init_std=0.3)


def write(run_dir: Path, config: Config, state: dict[str, str]) -> None:
    """A checkpoint of drawn weights: of LoRA the factors alone, B too, which training begins at zero."""
    engine = build(config, SoloWorld(), lambda name, shape: drawn(name, shape, config))
    counters = dataclasses.asdict(State(**state))
    save(run_dir, config, engine.mesh, engine.shards, engine.spans(), {"weight": engine.stored()}, counters)
    (run_dir / "config.yaml").write_text(to_yaml(config))


def drawn(name: str, shape: tuple[int, ...], config: Config) -> torch.Tensor:
    # drawn as A is: training begins with B at zero
    return draw(name.removesuffix(".b") + ".a" if name.endswith(".b") else name, shape, config.model, 7)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, a run; lora/, adapters beside it, with a tokenizer."""
    root = tmp_path_factory.mktemp("runs")
    plain = Config(model=MODEL, parallel=ParallelConfig(tp=1, pp=1), train=TrainConfig(dtype="fp64", seq_len=32))
    lora = dataclasses.replace(plain, tune=TuneConfig(mode="lora", lora_rank=4, lora_alpha=8.0))
    texts = [json.loads(line)["text"] for line in (CORPUS / "kjv.jsonl").open()][::40]
    tokenizer = train_tokenizer(texts, MODEL.vocab_size)
    for name, config in (("base", plain), ("lora", lora)):
        (root / name).mkdir()
        (root / name / "tokenizer.model").write_bytes(tokenizer)
        base = root / "base" / "checkpoints" / "step-00000000"
        write(root / name, resolve(config, 1), {"base": name_of(base)} if name == "lora" else {})
    return root


def generate(model: Path, tp: int = 1, pp: int = 1) -> tuple[list[list[int]], list[float]]:
    """The greedy tokens of PROMPTS, and log-likelihoods."""
    source = open_source(model, tp=tp, pp=pp, world_size=tp * pp, device="cpu")

    def say(world: World) -> tuple[list[list[int]], list[float]]:
        stage = load_stage(source, world)
        tokens = [list(row) for row in zip(*islice(decode(stage, PROMPTS, Settings(NEW)), NEW))]
        return tokens, log_likelihoods(stage, [(prompt, [1, 2, 3]) for prompt in PROMPTS])

    first, *others = run_threads(tp * pp, say)
    assert all(other == first for other in others)
    return first


def test_it_says_what_its_merged_weights_say(runs: Path, tmp_path: Path) -> None:
    merge_adapter(runs / "lora", tmp_path / "merged")
    to_hf_folder(runs / "lora", tmp_path / "hf")
    expected, measured = generate(tmp_path / "merged")
    assert generate(runs / "base")[0] != expected
    for model in (runs / "lora", tmp_path / "hf"):
        for tp, pp in ((1, 1), (2, 2)):
            tokens, figures = generate(model, tp, pp)
            assert tokens == expected
            assert figures == pytest.approx(measured, rel=1e-12)


def test_without_its_base_it_is_refused(runs: Path) -> None:
    (runs / "base").rename(runs / "elsewhere")
    try:
        with pytest.raises(ValueError, match=r"holds adapters whose base is missing: .*/base.*no such folder"):
            open_source(runs / "lora")
    finally:
        (runs / "elsewhere").rename(runs / "base")
