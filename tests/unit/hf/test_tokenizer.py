"""A run's own tokenizer, opened by AutoTokenizer, cuts text as it does in megalite."""

import json
from pathlib import Path

import pytest
import sentencepiece
import transformers
from assets import asset

from megalite.data.tokenizer import load_tokenizer
from megalite.hf.tokenizer import write_tokenizer

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
    with pytest.raises(ValueError, match=r"no tokenizer.json cuts text as this sentencepiece model does"):
        write_tokenizer(train(tmp_path, **settings), tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
