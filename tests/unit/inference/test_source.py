"""Models that generation opens: what they are, how they are laid out, and every mistake in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from assets import asset

from megalite.checkpoint.folder import find
from megalite.config import ModelConfig
from megalite.exchange.hf_folder import open_folder
from megalite.inference.chat import Chat
from megalite.inference.decode import load_stage, stream
from megalite.inference.reply import Reply, Settings
from megalite.inference.source import open_source
from megalite.parallel.groups import World
from megalite.parallel.threads import run_threads
from megalite.plan import topology

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village,",
    "def fibonacci(n):",
    "床前明月光，",
    "北京是中国的",
]
NEW = 32


@pytest.fixture(scope="module")
def transformers_model() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(asset("smollm2"), dtype=torch.float32).eval()


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (3, 2)])
def test_a_hugging_face_folder_says_what_transformers_says(
    tp: int, pp: int, transformers_model: torch.nn.Module
) -> None:
    """Each token is the likeliest to transformers after those before it, so its greedy generation is the same."""
    source = open_source(asset("smollm2"), tp=tp, pp=pp, world_size=tp * pp, device="cpu")
    assert source.config.train.dtype == "fp32"
    assert (source.start, source.stops, source.limit) == ((), {2}, 8192)
    settings = Settings(NEW)

    def say(world: World) -> list[Reply]:
        stage = load_stage(source, world)
        replies = [
            Reply(source.tokenizer, source.tokenizer.encode(prompt), settings, source.stops, source.limit)
            for prompt in PROMPTS
        ]
        for _ in stream(stage, replies, settings):
            pass
        return replies

    first, *others = run_threads(tp * pp, say)
    for replies in others:
        assert [reply.ids for reply in replies] == [reply.ids for reply in first]
    for reply in first:
        with torch.no_grad():
            logits = transformers_model(torch.tensor([reply.prompt + reply.ids])).logits[0]
        generated = reply.ids + [2] * (reply.ended == "stop token")
        assert logits[len(reply.prompt) - 1 :].argmax(-1).tolist()[: len(generated)] == generated
    assert sum(reply.ended == "length" for reply in first) >= 4


def test_a_chat_is_the_templates_text_and_ends_with_its_turn() -> None:
    from transformers import AutoTokenizer

    source = open_source(asset("smollm2"), device="cpu")
    chat = Chat(source.tokenizer, None, "Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    theirs = AutoTokenizer.from_pretrained(asset("smollm2"))
    for question in ("你好 😀", "And then?"):
        messages.append({"role": "user", "content": question})
        rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert chat.ask(question) == theirs(rendered, add_special_tokens=False).input_ids
        chat.answered("Well.")
        messages.append({"role": "assistant", "content": "Well."})
    assert chat.stops == {2}


@pytest.mark.parametrize(("template", "ends"), [("chatml", "<|im_end|>"), ("plain", None)])
def test_what_ends_a_turn_is_read_off_the_template(template: str, ends: str | None) -> None:
    tokenizer = open_source(asset("smollm2"), device="cpu").tokenizer
    stops = Chat(tokenizer, template).stops
    assert ends is None or stops == {tokenizer.controls[ends]}


def test_all_ids_that_end_a_text_are_used(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in asset("smollm2").iterdir():
        shutil.copy(file, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [2, 7]}))
    assert open_source(folder, device="cpu").stops == {2, 7}


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tp": 2, "world_size": 2}, r"parallel.tp=2 does not divide model.num_heads=9; use 1 or 3"),
        ({"tp": 3}, r"tp 3 x pp 1 = 3, but the world size is 1; start it with torchrun --nproc_per_node 3"),
        ({"tp": 1, "pp": 1, "world_size": 2}, r"tp 1 x pp 1 = 1, but the world size is 2; start it without torchrun"),
        ({"tp": 0}, r"tp=0, pp=None: both must be at least 1"),
        ({"pp": 31, "world_size": 31}, r"parallel.pp=31 stages need at least 31 layers"),
    ],
)
def test_a_layout_that_does_not_fit(layout: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(asset("smollm2"), **layout)


def test_ranks_alone_choose_a_layout() -> None:
    for ranks, tp, pp in ((1, 1, 1), (2, 1, 2), (3, 3, 1), (6, 3, 2)):
        config = open_source(asset("smollm2"), world_size=ranks).config
        assert (config.parallel.tp, config.parallel.pp, config.parallel.sp) == (tp, pp, False)


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        open_source(tmp_path / "none")
    with pytest.raises(ValueError, match="neither a checkpoint nor a run folder"):
        open_source(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="is a run folder of megalite, not a Hugging Face folder"):
        open_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(ValueError, match=r'model_type="mixtral" is not supported'):
        open_source(tmp_path)
    with pytest.raises(ValueError, match=r"is a Hugging Face folder, not a run folder; .* model.from_hf="):
        find(tmp_path)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "gpu_memory", list)
    with pytest.raises(ValueError, match="NVML finds no NVIDIA GPU here; use cpu or auto"):
        open_source(asset("smollm2"), device="cuda")


def test_learned_positions_are_a_bound(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=49152, n_embd=8, n_layer=1, n_head=2, n_positions=16)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"has no tokenizer.model or tokenizer.json"):
        open_source(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(asset("smollm2") / name, tmp_path)
    source = open_source(tmp_path)
    assert source.limit == 16
    assert isinstance(source.config.model, ModelConfig)
    assert source.config.model.position == "learned"
