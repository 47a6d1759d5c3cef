"""Reads the other files of a tokenizer's folder as AutoTokenizer does: special and added tokens, chat templates.

The rules are those of transformers 5; tests/unit/text/test_tokenizer_campaign.py compares with the installed version.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megalite.text.rows import json_type

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# transformers classes that use tokenizer.json unchanged
GENERIC = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
# transformers classes that build their own steps around the vocabulary, and their default special tokens
DEFAULTS = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
}
# model types for which transformers ignores the class in tokenizer_config.json
ALWAYS = {"mistral": "TokenizersBackend", "mixtral": "TokenizersBackend", "phi3": "TokenizersBackend"}
ALWAYS |= {"qwen2": "Qwen2Tokenizer"}
# model types whose class transformers uses if no file names one
OTHERWISE = {"qwen3": "Qwen2Tokenizer", "gpt2": "GPT2Tokenizer"}


class Added(NamedTuple):
    """A token that is matched in text before the model runs; the fields are those of tokenizers.AddedToken.

    `normalized`: whether it is matched in normalised text; None: not if it is `special`.
    """

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False


@dataclass(frozen=True)
class SideFiles:
    """The content of the files next to a tokenizer file.

    `kind`: the transformers class that opens tokenizer.json. `named`: special tokens by name, such as eos_token.
    `extra`: special tokens without a name. `added`: added tokens by id. `templates`: chat templates by name, from
    `template_file`. `options`: all of tokenizer_config.json. `alone`: whether there are no such files.
    """

    kind: str = "TokenizersBackend"
    named: dict[str, str | Added] = field(default_factory=dict)
    extra: list[str | Added] = field(default_factory=list)
    added: dict[int, Added] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)
    template_file: str = CONFIG
    options: dict[str, Any] = field(default_factory=dict)
    alone: bool = False


def read_side_files(path: Path) -> SideFiles:
    """Read the files next to the tokenizer file `path`. Raises ValueError if one is damaged or not supported."""
    config = read_optional_json(path.with_name(CONFIG))
    fast = path.suffix == ".json"
    tokenizer = read_optional_json(path) if fast else {}
    kind = _kind(path, config, read_optional_json(path.with_name("config.json")), tokenizer)
    where = str(path.with_name(CONFIG))
    values: dict[str, Any] = {key: _tokens(value, f"{where}: {key}") for key, value in config.items()}
    if not values.get("extra_special_tokens") and "additional_special_tokens" in values:
        values["extra_special_tokens"] = values.pop("additional_special_tokens")
    extra = values.get("extra_special_tokens") or []
    every = list(extra.values() if isinstance(extra, dict) else extra) if isinstance(extra, (dict, list)) else [extra]
    if not all(isinstance(token, (str, Added)) for token in every):
        raise ValueError(f"{where}: extra_special_tokens is not a list of tokens; write their strings")
    if "added_tokens_decoder" in config:
        added = _decoder(config["added_tokens_decoder"], f"{where}: added_tokens_decoder")
    else:
        values |= _token_map(path.with_name(MAP), values)
        added = _older_added(path, values, tokenizer)
    by_content = {token.content: token for token in added.values()}
    named = {key: by_content.get(_content(token), token) for key, token in _named(kind, values, tokenizer).items()}
    extra = values.get("extra_special_tokens") or []
    if isinstance(extra, dict):
        named |= {key: token for key, token in extra.items() if isinstance(token, (str, Added))}
        extra = []
    # the order in which transformers assigns ids to new tokens: standard names, then descriptions, then plain strings
    plain = {key for key, token in named.items() if isinstance(token, str)}
    rest = sorted(named.keys() - set(STANDARD), key=lambda key: (key in plain, list(named).index(key)))
    named = {key: named[key] for key in (*STANDARD, *rest) if key in named}
    templates, file = _templates(path.parent, config)
    alone = not (templates or any(path.with_name(name).is_file() for name in (CONFIG, MAP, ADDED, "config.json")))
    return SideFiles(kind, named, extra, added, templates, file, config, alone)


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file, {} if there is no file. Raises ValueError for any other content."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise ValueError(f"{path}: not JSON ({reason}); fetch the file again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is {json_type(found)}, expected a JSON object; fetch the file again")
    return found


def tokens_to_add(side: SideFiles, known: Mapping[int, Added]) -> list[Added]:
    """Return the tokens to add, in order, to a tokenizer that already has the added tokens `known` by id."""
    tokens: list[str | Added] = [token for _, token in sorted(side.added.items())]
    names = {_content(token) for token in side.named.values()}
    present = {token.content for token in known.values()} | {_content(token) for token in tokens}
    for token in (*side.named.values(), *side.extra):
        # a token with two descriptions is added twice, and the last description wins
        if _content(token) not in present and token not in tokens:
            tokens.append(token)
    return [
        Added(token, normalized=False, special=True)
        if isinstance(token, str)
        else token._replace(special=token.special or token.content in names)
        for token in tokens
    ]


def copy_files(source: Path, target: Path, add: Sequence[str] = ()) -> None:
    """Copy the tokenizer file `source` and the files next to it into the folder `target`, with the tokens `add`."""
    shutil.copyfile(source, target / ("tokenizer.json" if source.suffix == ".json" else "tokenizer.model"))
    for name in (CONFIG, MAP, ADDED):
        if source.with_name(name).is_file():
            shutil.copyfile(source.with_name(name), target / name)
    copy_templates(source.parent, target)
    if add:
        config = read_optional_json(target / CONFIG)
        extra = config.pop("extra_special_tokens", None) or config.pop("additional_special_tokens", None) or []
        if isinstance(extra, dict):
            extra |= {f"added_{number}_token": token for number, token in enumerate(add)}
        config["extra_special_tokens"] = extra if isinstance(extra, dict) else [*extra, *add]
        (target / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_templates(source: Path, target: Path) -> None:
    """Copy the chat templates that are separate files."""
    for file in ((source / TEMPLATE), *sorted((source / TEMPLATES).glob("*.jinja"))):
        if file.is_file():
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def _kind(path: Path, config: Mapping[str, Any], model: Mapping[str, Any], file: Mapping[str, Any]) -> str:
    model_type = model.get("model_type")
    declared = config.get("tokenizer_class") or model.get("tokenizer_class") or OTHERWISE.get(str(model_type))
    if model_type in ALWAYS:
        return ALWAYS[model_type]
    name = str(declared or "TokenizersBackend").removesuffix("Fast")
    if name in GENERIC or path.suffix != ".json" or (name == "LlamaTokenizer" and _byte_level(file)):
        return "TokenizersBackend" if name in GENERIC or path.suffix == ".json" else name
    if name not in DEFAULTS:
        raise ValueError(
            f"{path.with_name(CONFIG)}: tokenizer_class={declared} is not supported; use {', '.join(DEFAULTS)}, or "
            f"PreTrainedTokenizerFast to use tokenizer.json unchanged"
        )
    return name


def _byte_level(file: Mapping[str, Any]) -> bool:
    parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    return any('"ByteLevel"' in json.dumps(file.get(part)) for part in parts)


def _content(token: str | Added) -> str:
    return token if isinstance(token, str) else token.content


def _tokens(value: Any, where: str) -> Any:
    """Convert every description of an added token inside `value` to Added."""
    if isinstance(value, dict):
        if value.get("__type") == "AddedToken" or ("content" in value and where.endswith("_token")):
            return _added(value, where)
        return {key: _tokens(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_tokens(item, where) for item in value]
    return value


def _added(value: Any, where: str) -> Added:
    flags = {key: item for key, item in value.items() if key in Added._fields} if isinstance(value, dict) else {}
    wrong = [key for key, item in flags.items() if not isinstance(item, str if key == "content" else bool)]
    if wrong or not flags.get("content"):
        raise ValueError(f"{where}: an added token has an invalid {wrong[0] if wrong else 'content'}; found {value!r}")
    return Added(**flags)


def _decoder(entries: Any, where: str) -> dict[int, Added]:
    if not isinstance(entries, dict) or not all(str(key).isdecimal() for key in entries):
        raise ValueError(f"{where} is not an object with ids as keys; fetch the file again")
    return {int(key): _added(value, f"{where}.{key}") for key, value in entries.items()}


def _token_map(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The content of special_tokens_map.json, which takes precedence over tokenizer_config.json."""
    found: dict[str, Any] = {}
    for key, value in read_optional_json(path).items():
        if isinstance(value, dict) and key != "extra_special_tokens":
            found[key] = _added(value, f"{path}: {key}")._replace(special=True)
        elif isinstance(value, list):
            tokens = [
                _added(item, f"{path}: {key}")._replace(special=True) if isinstance(item, dict) else item
                for item in value
            ]
            before = list(values.get("extra_special_tokens") or []) if key == "extra_special_tokens" else []
            if key == "extra_special_tokens" or "extra_special_tokens" not in values:
                found["extra_special_tokens"] = before + [token for token in tokens if token not in before]
        else:
            found[key] = value
    return found


def _older_added(path: Path, values: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> dict[int, Added]:
    """Added tokens that tokenizer_config.json does not list: from added_tokens.json, then tokenizer.json."""
    extra = values.get("extra_special_tokens") or []
    special = {_content(values[key]) for key in STANDARD if isinstance(values.get(key), (str, Added))}
    special |= {_content(token) for token in extra if isinstance(token, (str, Added))}
    found: dict[int, Added] = {}
    for content, number in read_optional_json(path.with_name(ADDED)).items():
        if isinstance(number, bool) or not isinstance(number, int) or not content:
            raise ValueError(f"{path.with_name(ADDED)}: {content!r}: {number!r} is not an id; fetch the file again")
        found[number] = Added(content, normalized=content not in special, special=content in special)
    for number, token in enumerate(tokenizer.get("added_tokens") or []):
        found[token["id"]] = _added(token, f"{path}: added token {number}")
    return found


def _named(kind: str, values: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> dict[str, str | Added]:
    padding = tokenizer.get("padding")
    usual = {"pad_token": padding["pad_token"]} if isinstance(padding, dict) and "pad_token" in padding else {}
    found = {**usual, **DEFAULTS.get(kind, {}), **{key: values[key] for key in values if key.endswith("_token")}}
    for key in STANDARD:
        if not isinstance(found.get(key), (str, Added, type(None))):
            raise ValueError(f"{CONFIG}: {key} is {found[key]!r}, expected the string of a token")
    return {key: token for key, token in found.items() if isinstance(token, (str, Added)) and _content(token)}


def _templates(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Return chat templates by name and their file. Separate files take precedence over tokenizer_config.json."""
    files = {"default": folder / TEMPLATE} if (folder / TEMPLATE).is_file() else {}
    files |= {path.stem: path for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    if files:
        return {name: path.read_text("utf-8") for name, path in files.items()}, TEMPLATE
    found = config.get("chat_template")
    if isinstance(found, list):
        try:
            return {each["name"]: each["template"] for each in found}, CONFIG
        except (TypeError, KeyError):
            raise ValueError(f"{folder / CONFIG}: an entry of chat_template lacks name or template") from None
    if found is not None and not isinstance(found, str):
        raise ValueError(f"{folder / CONFIG}: chat_template is {json_type(found)}, expected text or a list")
    return ({} if found is None else {"default": found}), CONFIG
