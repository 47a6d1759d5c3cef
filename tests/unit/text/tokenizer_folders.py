"""Random variations of the files in a tokenizer folder."""

import copy
import json
import random
from pathlib import Path
from typing import Any

from assets import asset

from megalite.text.tokenizer import Tokenizer, load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)
OWN = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|sep|>{% endfor %}\n"
)
TOOLS = "{% if tools %}tools {{ tools | tojson }}{% endif %}\n" + CHATML
TEXTS = [
    "In the beginning God created the heaven and the earth.",
    " a\n\n b <|im_start|>user\nX <|im_end|> \n <|sep|><|new|> <|new|>x",
    "Caf\u00e9 e\u0301 2026 ABC <|endoftext|> <|tool|>  end<s> </s>x",
]
TOKENS = ["<|im_start|>", "<|im_end|>", "<|sep|>", "<|new|>", "<|tool|>", "<|endoftext|>", "@word"]
CLASSES = [None, "PreTrainedTokenizerFast", "TokenizersBackend", "GPT2Tokenizer", "Qwen2TokenizerFast"]
CLASSES += ["LlamaTokenizerFast", "XLMRobertaTokenizer"]


def small(folder: Path, draw: random.Random) -> dict[str, Any]:
    """A byte-level or a Metaspace BPE of its own, quick to open."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    built = Tokenizer(models.BPE(byte_fallback=False, fuse_unk=False))
    if draw.random() < 0.7:
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=draw.random() < 0.2)
        built.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    else:
        scheme = draw.choice(["first", "always", "never"])
        built.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=draw.random() < 0.5)
        built.decoder, alphabet = decoders.Metaspace("▁"), sorted(set("".join(TEXTS)) - {" "})
    special = draw.sample(TOKENS, draw.randrange(5))
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    built.train_from_iterator([*TEXTS[:1], "hi yes user assistant That is all."] * 3, trainer)
    found: dict[str, Any] = json.loads(built.to_str())
    return found


REAL: dict[str, dict[str, Any]] = {}


def real(name: str) -> dict[str, Any]:
    if name not in REAL:
        REAL[name] = json.loads(asset(f"{name}/tokenizer.json").read_text("utf-8"))
    return copy.deepcopy(REAL[name])


def described(content: str, draw: random.Random, typed: bool = True) -> dict[str, Any]:
    flags = {key: draw.random() < 0.15 for key in ("lstrip", "rstrip", "single_word")}
    flags |= {key: draw.random() < 0.5 for key in ("normalized", "special")}
    if draw.random() < 0.3:
        del flags["normalized"]
    return {"content": content, **flags, **({"__type": "AddedToken"} if typed else {})}


def vary_tokenizer(tokenizer: dict[str, Any], draw: random.Random) -> None:
    for token in list(tokenizer["added_tokens"])[-40:]:
        if draw.random() < 0.3:
            tokenizer["added_tokens"].remove(token)
        elif draw.random() < 0.5:
            flags = described("", draw, typed=False)
            token |= {key: value for key, value in flags.items() if key != "content"}
    if draw.random() < 0.4:
        byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        tokenizer["post_processor"] = draw.choice([None, byte_level])
    if draw.random() < 0.3:
        norm = [{"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Prepend", "prepend": "_"}, None]
        tokenizer["normalizer"] = draw.choice(norm)


def vary_config(draw: random.Random, vocabulary: int) -> dict[str, Any]:
    def token(content: str) -> Any:
        return draw.choice([content, described(content, draw)])

    config: dict[str, Any] = {"tokenizer_class": draw.choice(CLASSES)} if draw.random() < 0.8 else {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if draw.random() < 0.6:
            config[key] = draw.choice([token(draw.choice(TOKENS)), token(draw.choice(TOKENS)), None])
    if draw.random() < 0.3:
        config["image_token"] = token("<|image|>")
    if draw.random() < 0.4:
        config[draw.choice(["extra_special_tokens", "additional_special_tokens"])] = [
            token(content) for content in draw.sample(TOKENS, 2)
        ]
    elif draw.random() < 0.2:
        config["extra_special_tokens"] = {"boi_token": "<|new|>"}
    if draw.random() < 0.4:
        config["added_tokens_decoder"] = {
            str(vocabulary + i): described(content, draw, typed=False)
            for i, content in enumerate(draw.sample(TOKENS, draw.randrange(4)))
        }
    for key in ("add_bos_token", "add_eos_token", "split_special_tokens", "add_prefix_space", "legacy"):
        if draw.random() < 0.2:
            config[key] = draw.random() < 0.5
    if draw.random() < 0.5:
        config["chat_template"] = draw.choice(
            [CHATML, OWN, [{"name": "tool_use", "template": TOOLS}, {"name": "default", "template": OWN}]]
        )
    return config


def make_folder(folder: Path, draw: random.Random) -> None:
    name = draw.choices(["small", "smollm2", "deepseek"], [12, 3, 1])[0]
    tokenizer = small(folder, draw) if name == "small" else real(name)
    vary_tokenizer(tokenizer, draw)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    vocabulary = max([len(tokenizer["model"]["vocab"]), *(1 + token["id"] for token in tokenizer["added_tokens"])])
    if draw.random() < 0.9:
        config = vary_config(draw, vocabulary)
        (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    if draw.random() < 0.3:
        named = {key: draw.choice(TOKENS) for key in draw.sample(["bos_token", "eos_token", "pad_token"], 2)}
        named |= {"cls_token": described("<|cls|>", draw, typed=False)} if draw.random() < 0.3 else {}
        (folder / "special_tokens_map.json").write_text(json.dumps(named), "utf-8")
    if draw.random() < 0.2:
        (folder / "added_tokens.json").write_text(json.dumps({"<|new|>": vocabulary, "@word": vocabulary + 1}), "utf-8")
    if draw.random() < 0.5:
        (folder / "chat_template.jinja").write_text(draw.choice([CHATML, OWN, TOOLS]), "utf-8")
    if draw.random() < 0.25:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS, "utf-8")
    if draw.random() < 0.3:
        kind = draw.choice(["llama", "mistral", "qwen2", "qwen3", "gpt2"])
        (folder / "config.json").write_text(json.dumps({"model_type": kind}), "utf-8")


def opened(folder: Path) -> tuple[Tokenizer | None, str]:
    try:
        return load_tokenizer(folder), ""
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
    return None, f"refused: {message.partition(': ')[2][:40]}"
