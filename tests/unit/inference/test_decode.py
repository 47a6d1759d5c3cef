"""Every layout, with a cache and a batch, chooses the tokens that the plain model without them chooses one by one."""

import dataclasses
import functools
from collections.abc import Sequence
from itertools import islice

import pytest
import torch
from models import tiny

from megalite.config import Config, ParallelConfig, TrainConfig, check, resolve
from megalite.engine.stage import build_stage
from megalite.inference import decode as decode_module
from megalite.inference.decode import CachedCore, decode
from megalite.inference.reply import Settings
from megalite.model.context import Context
from megalite.model.decoder import Decoder
from megalite.model.init import draw
from megalite.parallel.groups import SoloWorld, World
from megalite.parallel.threads import run_threads

NEW = 9
PROMPTS = ([5, 17, 3, 88, 41, 2, 60], [9], [77, 30, 12])
BASE = tiny(num_layers=4, init_std=0.4)
MODELS = {
    "llama": BASE,
    "window": dataclasses.replace(BASE, sliding_window=3, tie_embeddings=True),
    "gpt2": tiny(
        num_layers=4,
        init_std=0.4,
        num_kv_heads=4,
        norm="layernorm",
        activation="gelu_tanh",
        position="learned",
        max_positions=len(PROMPTS[0]) + NEW,
        linear_bias=True,
    ),
}


def config(model: str, tp: int = 1, pp: int = 1) -> Config:
    train = TrainConfig(dtype="fp64", seq_len=16)
    found = resolve(Config(model=MODELS[model], parallel=ParallelConfig(tp=tp, pp=pp, sp=False), train=train), tp * pp)
    check(found, tp * pp)
    return found


def generate(world: World, c: Config, prompts: Sequence[Sequence[int]], settings: Settings) -> list[list[int]]:
    """The new tokens of each prompt."""
    stage = build_stage(c, world)
    return [list(row) for row in zip(*islice(decode(stage, prompts, settings), settings.max_new_tokens))]


@functools.cache
def expected(model: str) -> list[list[int]]:
    """Greedy tokens of the plain model, each by a forward over all before it."""
    c = config(model)
    plain = Decoder(c.model, range(c.model.num_layers)).double().eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(draw(name, tuple(parameter.shape), c.model, c.train.seed))
        found = []
        for prompt in PROMPTS:
            tokens = list(prompt)
            for _ in range(NEW):
                positions = torch.arange(len(tokens)).unsqueeze(0)
                tokens.append(int(plain(torch.tensor([tokens]), Context(positions))[0, -1].argmax()))
            found.append(tokens[len(prompt) :])
    assert len({token for row in found for token in row}) > NEW  # not one token for ever
    return found


# tp 4 replicates the two kv heads of llama and window
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (4, 2)])
@pytest.mark.parametrize("model", MODELS)
def test_greedy_is_the_same_at_every_layout(model: str, tp: int, pp: int) -> None:
    c = config(model, tp, pp)
    for row in run_threads(tp * pp, lambda world: generate(world, c, PROMPTS, Settings(NEW))):
        assert row == expected(model)


@pytest.mark.parametrize("model", MODELS)
def test_a_batch_is_its_prompts_one_by_one(model: str) -> None:
    for prompt, row in zip(PROMPTS, expected(model), strict=True):
        assert generate(SoloWorld(), config(model), [prompt], Settings(NEW)) == [row]


def test_samples_are_the_same_at_every_layout_and_batch() -> None:
    settings = Settings(NEW, temperature=1.5, top_k=40, top_p=0.9, repetition_penalty=1.3, seed=7)
    together = generate(SoloWorld(), config("llama"), PROMPTS, settings)
    assert together != expected("llama")
    c = config("llama", tp=2, pp=2)
    for rows in run_threads(4, lambda world: generate(world, c, PROMPTS, settings)):
        assert rows == together
    for i, prompt in enumerate(PROMPTS):
        alone = dataclasses.replace(settings, seed=7 + i)
        assert generate(SoloWorld(), config("llama"), [prompt], alone) == together[i : i + 1]
    again = dataclasses.replace(settings, seed=100)
    assert generate(SoloWorld(), config("llama"), PROMPTS, again) != together


def test_a_cache_that_grows_forgets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "BLOCK", 4)
    assert generate(SoloWorld(), config("window"), PROMPTS, Settings(NEW)) == expected("window")


def test_the_model_is_left_as_it_was() -> None:
    stage = build_stage(config("llama"), SoloWorld())
    tokens = decode(stage, PROMPTS, Settings(NEW))
    next(tokens)
    assert any(isinstance(module, CachedCore) for module in stage.models[0].modules())
    tokens.close()
    assert not any(isinstance(module, CachedCore) for module in stage.models[0].modules())
    logits = stage.logits(torch.tensor([PROMPTS[0]]), torch.arange(7).unsqueeze(0), None)
    assert logits is not None
    assert logits.shape == (1, 7, 101)
