"""Writes masks.json: every conversation of conversations.json as three real tokenizers see it, to be read by eye.

    python tests/unit/text/golden/make.py

test_masks.py holds the code to this file, and this file to transformers.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

from assets import asset

from megalite.text.chat import ChatTemplate, find_template
from megalite.text.conversations import normalise
from megalite.text.masks import token_weights, weighted_spans
from megalite.text.tokenizer import load_tokenizer

HERE = Path(__file__).resolve().parent
TOKENIZERS = {"smollm2": "smollm2", "deepseek": "deepseek/tokenizer.json", "mistral-v3": "mistral-v3/tokenizer.model"}


def template_for(tokenizer: str, name: str) -> str | None:
    """SmolLM2's own has no generation spans; it and Mistral's know no tools."""
    if name == "tool call":
        return "qwen" if tokenizer == "smollm2" else "plain"
    return {"smollm2": None, "deepseek": "plain", "mistral-v3": "mistral"}[tokenizer]


def masks() -> dict[str, dict[str, dict[str, object]]]:
    rows = json.loads((HERE / "conversations.json").read_text("utf-8"))
    found: dict[str, dict[str, dict[str, object]]] = {}
    for which, path in TOKENIZERS.items():
        tokenizer = load_tokenizer(asset(path))
        for name, row in rows.items():
            template = ChatTemplate(*find_template(template_for(which, name), tokenizer), tokenizer)
            conversation = normalise(row)
            rendered = template.render(conversation)
            encoding = tokenizer.encode_chat(rendered.text)
            weights = token_weights(
                rendered.text, encoding, weighted_spans(conversation, rendered, "assistant")
            ).tolist()
            tokens = [f"{rendered.text[start:stop]}" for start, stop in encoding.spans]
            found.setdefault(which, {})[name] = {
                "template": template.name,
                "ids": " ".join(map(str, encoding.ids)),
                "weights": " ".join(f"{weight:g}" for weight in weights),
                "trained": [token for token, weight in zip(tokens, weights) if weight],
            }
    return found


if __name__ == "__main__":
    (HERE / "masks.json").write_text(json.dumps(masks(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
