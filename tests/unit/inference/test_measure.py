"""Log-likelihoods at every layout, against transformers on the same weights and against sums by hand."""

import math

import pytest
import torch
from assets import asset
from models import TINY
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from megalite.config import Config, ParallelConfig, TrainConfig, resolve
from megalite.engine.stage import build_stage
from megalite.inference.decode import load_stage
from megalite.inference.eval_rows import Cloze, cloze_sequences
from megalite.inference.measure import answer, log_likelihoods, score
from megalite.inference.reply import Reply, Settings
from megalite.inference.source import open_source
from megalite.model.layouts import from_hf
from megalite.parallel.groups import SoloWorld, World
from megalite.parallel.threads import run_threads

LAYOUTS = [(1, 1), (2, 1), (1, 2), (4, 2)]
SEQUENCES = [([5], [17, 3]), ([9, 88, 4, 61], [7]), ([1, 2], [3] * 9), ([30], [31])]
MODEL = TINY


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        intermediate_size=36,
        rms_norm_eps=MODEL.norm_eps,
        initializer_range=0.5,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).double().eval()


def config(tp: int, pp: int, seq_len: int = 8) -> Config:
    train = TrainConfig(dtype="fp64", seq_len=seq_len, micro_batch_size=2)
    return resolve(Config(model=MODEL, parallel=ParallelConfig(tp=tp, pp=pp, sp=False), train=train), tp * pp)


def by_transformers(model: nn.Module, context: list[int], continuation: list[int]) -> float:
    with torch.no_grad():
        logs = model(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
    return sum(float(logs[len(context) - 1 + i, token]) for i, token in enumerate(continuation))


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_log_likelihoods(tp: int, pp: int, theirs: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalite.inference.measure.AT_ONCE", 3)  # the four are padded in two goes
    c, weights = config(tp, pp), theirs.state_dict()

    def measure(world: World) -> list[float]:
        stage = build_stage(c, world, lambda name, _: from_hf(weights.__getitem__, name, c.model))
        return log_likelihoods(stage, SEQUENCES)

    expected = [by_transformers(theirs, *sequence) for sequence in SEQUENCES]
    for found in run_threads(tp * pp, measure):
        assert found == pytest.approx(expected, rel=1e-5)  # their rotary angles are fp32


def test_a_model_of_zeros_gives_each_token_the_same() -> None:
    stage = build_stage(config(1, 1), SoloWorld(), lambda _, shape: torch.zeros(shape))
    expected = [-len(continuation) * math.log(101) for _, continuation in SEQUENCES]
    assert log_likelihoods(stage, SEQUENCES) == pytest.approx(expected, rel=1e-12)


def test_choices_and_answers_of_a_real_model() -> None:
    """SmolLM2: log-likelihoods are transformers', and it knows a capital."""
    from transformers import AutoModelForCausalLM

    source = open_source(asset("smollm2"), device="cpu")
    stage = load_stage(source, SoloWorld())
    rows = [
        Cloze("The capital of France is", ("London", "Paris", "a city in the north of Italy"), 1),
        Cloze("2 + 2 =", ("4", "a horse"), 0),
    ]
    shots = [Cloze("The capital of Italy is", ("Rome", "Oslo"), 0)]
    sequences = cloze_sequences(source, rows, shots)
    scores = score(stage, rows, sequences)
    model = AutoModelForCausalLM.from_pretrained(asset("smollm2"), dtype=torch.float32).eval()
    for row, choices, found in zip(rows, sequences, scores, strict=True):
        assert found.sums == pytest.approx([by_transformers(model, *each) for each in choices], rel=1e-4, abs=1e-3)
        assert found.best() == row.label
        assert found.tokens == [len(continuation) for _, continuation in choices]
        assert found.characters == [len(choice) for choice in row.choices]
    settings = Settings(8, stop=("\n",))
    shot = "Q: What is the capital of Spain?\nA: Madrid"
    ids = source.tokenizer.encode(f"{shot}\n\nQ: What is the capital of France?\nA:")
    replies = [Reply(source.tokenizer, prompt, settings, source.stops) for prompt in (ids, ids[-12:])]
    answer(stage, replies, settings, batch=1)
    assert all(reply.ended for reply in replies)
    assert replies[0].text.strip() == "Paris"


def test_a_choice_that_cannot_be_scored_is_named() -> None:
    source = open_source(asset("smollm2"), device="cpu")
    with pytest.raises(ValueError, match=r"row 1: prompt and choice 'x' need at least one token each"):
        cloze_sequences(source, [Cloze("", ("x", "y"), 0)], [])
    with pytest.raises(ValueError, match=r"row 1: \d+ tokens with choice 'x', but the model has 8192 positions"):
        cloze_sequences(source, [Cloze("word " * 9000, ("x", "y"), 0)], [])
