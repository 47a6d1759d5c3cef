"""peft's adapter_config.json as a `TuneConfig`: plain LoRA only, everything else is refused by name. No torch here.

The keys are those of peft's LoraConfig from 0.2 to 0.21. What any other key changes is not known, so it must be null.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from megalite.config import TuneConfig
from megalite.config.values import shown
from megalite.exchange.hf_config import ARCHITECTURES
from megalite.exchange.hf_fields import Fields, read_json

FILE = "adapter_config.json"
# initialisations that leave the base unchanged. pissa, olora, loftq, corda and lora_ga change its weights, and mica
# trains only one factor
INITIAL = (True, False, "gaussian", "orthogonal", "eva")
# key -> the values, besides null, with which peft computes plain LoRA
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    **dict.fromkeys(("use_rslora", "use_dora", "use_qalora", "lora_bias", "ensure_weight_tying"), (False,)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), ({},)),
    **dict.fromkeys(("modules_to_save", "layers_to_transform", "target_parameters"), ([],)),
    **dict.fromkeys(("trainable_token_indices", "alora_invocation_tokens", "layer_replication", "enable_lora"), ()),
    **dict.fromkeys(("megatron_config", "velora_config", "monteclora_config", "arrow_config", "kasa_config"), ()),
    "use_bdlora": (),
}
# keys that do not change the computation: origin, initialisation, and options of a key above
FREE = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode", "runtime_config"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core"),
        *("layers_pattern", "fan_in_fan_out", "merge_weights"),
    }
)
READ = frozenset({"r", "lora_alpha", "lora_dropout", "init_lora_weights", "target_modules", "exclude_modules"})
MOST_RANK = 2**20


def read_settings(folder: Path) -> Fields:
    """The keys of a folder's adapter_config.json. Raises ValueError, naming the key, for anything but plain LoRA."""
    fields = Fields(read_json(folder / FILE), str(folder / FILE))
    for key, value in fields.values.items():
        if key not in NEUTRAL and key not in FREE | READ and value is not None:
            raise fields.refuse(key, "is not a key of LoRA in peft 0.21, so what it changes is not known; remove it")
    fields.word("peft_type")
    fields.word("bias", "none")
    fields.neutral(NEUTRAL, "is not supported, only plain LoRA is; merge the adapter in peft if peft can")
    initial = fields.values.get("init_lora_weights", True)
    if not any(initial is known or (isinstance(initial, str) and initial == known) for known in INITIAL):
        raise fields.refuse(
            "init_lora_weights",
            "is not supported, it changes the base or the method; merge the adapter in peft, or save it there as plain "
            "LoRA (save_pretrained with path_initial_model_for_weight_conversion)",
        )
    mapping, bases = fields.values.get("auto_mapping") or {}, list(ARCHITECTURES.values())
    if not isinstance(mapping, dict) or mapping.get("base_model_class", bases[0]) not in bases:
        raise fields.refuse("auto_mapping", f"is not supported; the base must be one of {', '.join(bases)}")
    for key in ("fan_in_fan_out", "inference_mode", "merge_weights"):
        fields.flag(key, False)
    return fields


def tune_config(fields: Fields) -> TuneConfig:
    """Rank, alpha and dropout. Raises ValueError if one is out of range."""
    return TuneConfig(
        mode="lora",
        lora_rank=fields.whole("r", high=MOST_RANK),
        lora_alpha=fields.number("lora_alpha", above=0),
        lora_dropout=fields.number("lora_dropout", 0.0, low=0, below=1),
    )


def require_targets(fields: Fields, stored: Iterable[str], modules: Iterable[str]) -> None:
    """Raise ValueError unless the file has factors for exactly the modules that peft would adapt.

    `stored`: modules that the file has factors for; `modules`: all linears of the base's blocks. peft would ignore
    factors of other modules, and add random ones to targeted modules without any.
    """
    stored = set(stored)
    for module in modules:
        if _is_targeted(fields, module) != (module in stored):
            rest = (
                f"{module}, whose factors the file has" if module in stored else f"{module}, whose factors are missing"
            )
            word = "does not name" if module in stored else "names"
            raise fields.refuse("target_modules", f"{word} {shown(rest)}; save the adapter again with peft")


def _is_targeted(fields: Fields, module: str) -> bool:
    """Whether peft adapts the module (check_target_module_exists in peft/tuners/tuners_utils.py)."""
    excluded = fields.values.get("exclude_modules")
    if excluded and _matches(fields, "exclude_modules", module):
        return False
    target = fields.values.get("target_modules")
    if isinstance(target, str) and target.lower() == "all-linear":
        return True
    return _matches(fields, "target_modules", module)


def _matches(fields: Fields, key: str, module: str) -> bool:
    """Whether a key's value matches the module: a pattern for the whole name, or a list of names or endings."""
    names = fields.values.get(key)
    if isinstance(names, str):
        try:
            if _may_be_exponential(names):
                raise fields.refuse(
                    key, "repeats a repetition, which may take forever to match; list module names instead"
                )
            return re.fullmatch(names, module) is not None
        except (re.error, RecursionError, OverflowError) as error:
            raise fields.refuse(
                key, f"is not a regular expression ({error}); save the adapter again with peft"
            ) from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise fields.refuse(key, "is neither a string nor a list of strings; name the modules that have factors")
    return any(module == name or module.endswith(f".{name}") for name in names)


@functools.cache
def _may_be_exponential(pattern: str) -> bool:
    """Whether a pattern has a repetition or a choice within a repetition, or more than 12 of them.

    Python's matcher may then take exponential time on a name that does not match.
    """
    repeats, found = (parser.MAX_REPEAT, parser.MIN_REPEAT), 0

    def inside(part: Any, repeated: bool) -> bool:
        nonlocal found
        if isinstance(part, parser.SubPattern):
            return any(inside(item, repeated) for item in part)
        if not isinstance(part, list | tuple):
            return False
        varies = part[:1] == (parser.BRANCH,) or (part[:1] in [(r,) for r in repeats] and part[1][0] != part[1][1])
        found += varies
        within = repeated or (part[:1] in [(r,) for r in repeats] and part[1][1] > 1)
        return (varies and repeated) or any(inside(item, within) for item in part)

    return inside(parser.parse(pattern), False) or found > 12
