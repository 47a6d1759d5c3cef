"""A run's own tokenizer, opened by AutoTokenizer, splits text as it does in megalite."""

import json
from pathlib import Path

import pytest
import sentencepiece
import transformers
from assets import asset

from megalite.exchange.hf_tokenizer import write_tokenizer
from megalite.text.tokenizer import load_tokenizer

TEXTS = [row["instruction"] for row in json.loads(asset("instructions/alpaca_zh_demo.json").read_text("utf-8"))[:100]]
TEXTS += [row["output"] for row in json.loads(asset("instructions/alpaca_en_demo.json").read_text("utf-8"))[:50]]


def open_in_transformers(folder: Path) -> transformers.PreTrainedTokenizerBase:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["mistral-v1/tokenizer.model", "mistral-v3/tokenizer.model", "deepseek/tokenizer.json"]
)
def test_real_tokenizers(name: str, tmp_path: Path) -> None:
    here = load_tokenizer(asset(name))
    ids = write_tokenizer(asset(name), tmp_path)
    assert ids == {"bos_token_id": here.bos_id, "eos_token_id": here.eos_id, "pad_token_id": here.pad_id}
    there = open_in_transformers(tmp_path)
    assert (there.bos_token_id, there.eos_token_id) == (here.bos_id, here.eos_id)
    for text in TEXTS:
        tokens = here.encode(text)
        assert there(text, add_special_tokens=False)["input_ids"] == tokens
        assert there.decode(tokens, clean_up_tokenization_spaces=False) == here.decode(tokens)


def train(folder: Path, **settings: object) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[100:] * 3),
        model_prefix=str(folder / "own"),
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
        **settings,
    )
    return folder / "own.model"


@pytest.mark.parametrize("prefix", [False, True])
def test_a_model_as_the_demo_trains_it(prefix: bool, tmp_path: Path) -> None:
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    model = train(tmp_path, model_type="bpe", add_dummy_prefix=prefix, **settings)
    here, there = load_tokenizer(model), None
    write_tokenizer(model, tmp_path)
    there = open_in_transformers(tmp_path)
    assert all(there(text, add_special_tokens=False)["input_ids"] == here.encode(text) for text in TEXTS)


@pytest.mark.parametrize("settings", [{"model_type": "unigram"}, {"model_type": "bpe"}])
def test_a_model_without_an_equal_is_refused(settings: dict[str, str], tmp_path: Path) -> None:
    """Unigram cuts otherwise; sentencepiece's usual normalisation rewrites characters."""
    with pytest.raises(ValueError, match=r"no tokenizer.json splits text as this sentencepiece model does"):
        write_tokenizer(train(tmp_path, **settings), tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


CHAT = "<|im_start|>user\nhi  there<|im_end|>\n<|im_start|>assistant\n the king <|im_end|>"


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("kind", ["control_symbols", "user_defined_symbols"])
def test_symbols_of_a_sentencepiece_model(prefix: bool, kind: str, tmp_path: Path) -> None:
    """Whoever speaks between symbols, ids in the exported tokenizer are sentencepiece's."""
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "model_type": "bpe"}
    symbols = {kind: ["<|im_start|>", "<|im_end|>", *["\n"] * (kind == "user_defined_symbols")]}
    model = train(tmp_path, add_dummy_prefix=prefix, **symbols, **settings)
    here = load_tokenizer(model)
    write_tokenizer(model, tmp_path)
    there = open_in_transformers(tmp_path)
    for text in (CHAT, "a" + CHAT, *TEXTS):
        assert there(text, add_special_tokens=False)["input_ids"] == here.encode_chat(text).ids
    assert load_tokenizer(tmp_path / "tokenizer.json").encode_chat(CHAT).ids == here.encode_chat(CHAT).ids


def test_what_lies_beside_a_tokenizer_comes_along(tmp_path: Path) -> None:
    """Tokens that only the config adds, the names of special tokens, templates: one folder gives the other."""
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    file = json.loads((asset("smollm2") / "tokenizer.json").read_text("utf-8"))
    file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] != "<|im_end|>"]
    (source / "tokenizer.json").write_text(json.dumps(file), "utf-8")
    named = [{"name": "default", "template": "{{ messages[0].content }}"}, {"name": "tool_use", "template": "t"}]
    config = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|tool|>"], "chat_template": named}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|pad|>"}))
    ids = write_tokenizer(source, target, add=["<new>"], model_type="llama")
    before, after = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (source, target))
    assert (after.eos_token_id, after.pad_token_id) == (before.eos_token_id, before.pad_token_id)
    assert ids == {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": before.pad_token_id}
    text = "a<|tool|> <|im_end|><|pad|>b"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after("<new>")["input_ids"] == [1 + max(before.get_vocab().values())]
    for tools in (None, [{"type": "function", "function": {"name": "look"}}]):
        found = (
            each.apply_chat_template([{"role": "user", "content": "x"}], tools=tools, tokenize=False)
            for each in (before, after)
        )
        assert len(set(found)) == 1


def test_a_model_type_that_transformers_opens_with_steps_of_its_own(tmp_path: Path) -> None:
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "model_type": "bpe"}
    model = train(tmp_path, add_dummy_prefix=False, **settings)
    with pytest.raises(ValueError, match="for a qwen2 model transformers adds its own steps to the tokenizer"):
        write_tokenizer(model, tmp_path, model_type="qwen2")
    write_tokenizer(model, tmp_path, model_type="qwen3")
