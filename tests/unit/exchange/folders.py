"""Small random models of every family, as transformers writes them, with a tokenizer and a chat template."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 261  # 256 bytes and 5 more: tp 2 pads it
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 56,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {**SIZES, "rope_parameters": LLAMA3, "rms_norm_eps": 1e-5},
    "Mistral": {**SIZES, "sliding_window": 24, "head_dim": 16, "rope_parameters": {"rope_theta": 1e6}},
    "Qwen2": {**SIZES, "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": 8},
    "Qwen3": {**SIZES, "head_dim": 16},
    "GPT2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128},
}
Make = Callable[[str], Path]


def write_folder(folder: Path, family: str) -> None:
    config = getattr(transformers, f"{family}Config")(
        **FAMILIES[family], vocab_size=VOCAB, bos_token_id=256, eos_token_id=257, pad_token_id=None
    )
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # biases and norms too, that none of them could be lost unseen
            parameter.normal_(1.0 if ("norm" in key or "ln_" in key) and key.endswith("weight") else 0.0, 0.2)
    model.generation_config.update(do_sample=False, temperature=1.0, top_p=1.0)
    model.save_pretrained(folder)
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    fast.save_pretrained(folder)


def change(folder: Path, file: str, **keys: Any) -> None:
    """Set keys of a JSON file; a value of ... takes the key away."""
    path = folder / file
    values = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
