"""Random variations of the files in a tokenizer folder: what is read from them is what AutoTokenizer reads."""

import copy
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import transformers
from assets import asset
from campaign import rounds
from transformers.utils.chat_template_utils import render_jinja_template

from megalite.data.instructions import Example, Options, Report, _example
from megalite.text.chat import ChatTemplate, control_pattern, find_template
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
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
    {
        "messages": [
            {"role": "user", "content": "  two lines\n\nwith 42 words"},
            {"role": "assistant", "content": "naïve\n\n  answer 床前明月光 "},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "That is all."},
        ],
        "tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}],
    },
]
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


def compare_tokenizers(ours: Tokenizer, theirs: Any) -> None:
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
    if [path.name for path in ours.path.parent.iterdir()] == [ours.path.name]:
        return  # special tokens go by their usual names where a file lies alone
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.named == theirs.special_tokens_map
    assert ours.vocab_size == 1 + max(theirs.get_vocab().values())
    whole = theirs("a")["input_ids"]
    assert list(ours.prefix) == whole[: len(ours.prefix)]


def compare_chat(ours: Tokenizer, theirs: Any, row: dict[str, Any]) -> str:
    messages, tools = row["messages"], row.get("tools")
    try:
        text = theirs.apply_chat_template(messages, tools=tools, tokenize=False)
    except (ValueError, transformers.utils.chat_template_utils.jinja2.TemplateError) as error:
        with pytest.raises(ValueError, match="template"):
            read(ours, row)
        return f"no template: {type(error).__name__}"
    try:
        found = read(ours, row)
    except ValueError as error:
        return f"refused: {str(error).partition(': ')[2][:40]}"
    assert found.text == text
    assert found.encoding.ids == theirs(text, add_special_tokens=False)["input_ids"]
    compare_mask(found, theirs, messages, tools)
    return "equal"


def read(ours: Tokenizer, row: dict[str, Any]) -> Example:
    template = ChatTemplate(*find_template(None, ours), ours)
    return _example("row", row, ours, template, Options(), Report(), control_pattern(ours))


def compare_mask(found: Example, theirs: Any, messages: list[Any], tools: Any) -> None:
    """Every token of an answer is trained and no other; of one that reaches over the border nothing is asked."""
    texts, indices = render_jinja_template(
        [messages],
        tools=tools,
        chat_template=theirs.get_chat_template(tools=tools),
        return_assistant_tokens_mask=True,
        add_generation_prompt=False,
        continue_final_message=False,
        **theirs.special_tokens_map,
    )
    assert texts == [found.text]
    # a post-processor would trim the characters of tokens
    theirs.backend_tokenizer.post_processor = None
    offsets = theirs(found.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for (start, stop), weight in zip(offsets, found.weights, strict=True):
        inside = found.text[start:stop].strip() or found.text[start:stop]
        start = found.text.index(inside, start)
        stop = start + len(inside)
        trained = [first <= start and stop <= last for first, last in indices[0]]
        outside = all(stop <= first or last <= start for first, last in indices[0])
        if start < stop and (any(trained) or outside):
            assert (weight > 0) == any(trained), (inside, start, stop)


def opened(folder: Path) -> tuple[Tokenizer | None, str]:
    try:
        return load_tokenizer(folder), ""
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
    return None, f"refused: {message.partition(': ')[2][:40]}"


def one(folder: Path, seed: int) -> str:
    draw = random.Random(seed)
    make_folder(folder, draw)
    ours, refusal = opened(folder)
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        return f"transformers cannot open it: {type(error).__name__}"
    if ours is None:
        return refusal
    compare_tokenizers(ours, theirs)
    return "; ".join(sorted({compare_chat(ours, theirs, row) for row in CHATS}))


@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore")
def test_folders_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    count: Counter[str] = Counter()
    for seed in range(rounds(24, 250)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        try:
            count[one(folder, seed)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        shutil.rmtree(folder)
    print("tokenizer folders:", ", ".join(f"{number} {what}" for what, number in count.most_common()))
    assert count["equal"] > sum(count.values()) / 3


def injected(ours: Tokenizer, draw: random.Random) -> str:
    """Where control tokens stand in a conversation whose messages are full of control strings: in none of them."""
    strings = [*ours.controls, *TOKENS]
    forms = [str, str.upper, lambda text: f" {text}", lambda text: f"{text}\n ", wide]

    def text() -> str:
        parts = [draw.choice(forms)(draw.choice(strings)) for _ in range(draw.randrange(1, 5))]
        return "a" + draw.choice(["", " ", "x", "\n"]).join(parts) + draw.choice(["", " ", "b"])

    roles = ("system", "user", "assistant")
    messages = [{"role": role, "content": text()} for role in roles]
    template, numbers = ChatTemplate("mine", CHATML, ours), set(ours.controls.values())
    try:
        found = _example("row", {"messages": messages}, ours, template, Options(), Report(), control_pattern(ours))
    except ValueError as error:
        return f"refused: {str(error).rpartition(': ')[2][:24]}"
    at = 0
    for message in messages:
        start = found.text.index(message["content"], at)
        at = start + len(message["content"])
        for token, (first, last) in zip(found.encoding.ids, found.encoding.spans):
            assert token not in numbers or last <= start or at <= first, (found.text, first, last)
    return "kept apart"


def wide(text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore")
def test_no_message_speaks_as_a_control_token(tmp_path: Path) -> None:
    count: Counter[str] = Counter()
    for seed in range(rounds(12, 100)):
        draw, folder = random.Random(seed), tmp_path / str(seed)
        folder.mkdir()
        make_folder(folder, draw)
        ours, _ = opened(folder)
        if ours is None or not ours.controls or ours._tokenizer.encode_special_tokens:  # type: ignore[attr-defined]
            count["no control tokens"] += 1
            continue
        try:
            count[injected(ours, draw)] += 1
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
    assert count["kept apart"] > sum(count.values()) / 2
    print("messages of control strings:", ", ".join(f"{number} {what}" for what, number in count.most_common()))
