"""Which tokens are trained: golden files read by eye, and transformers' own masks on the same texts."""

import json
import os
import shutil
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from assets import asset
from chats import GOLDEN, ROWS, TOKENIZERS, made, template, tokenizer

from megalite.text.chat import Rendered, Span
from megalite.text.conversations import normalise, read_rows
from megalite.text.masks import require_trained, token_weights, weighted_spans
from megalite.text.messages import Conversation, RowError
from megalite.text.tokenizer import Encoding

MASKS: dict[str, Any] = json.loads((GOLDEN / "masks.json").read_text("utf-8"))
TURNS = ("user", "assistant") * 2
CASES = [(which, name) for which in TOKENIZERS for name in ROWS]


@pytest.mark.parametrize(("which", "name"), CASES)
def test_masks_are_the_golden_ones(which: str, name: str) -> None:
    golden = MASKS[which][name]
    own = golden["template"] == "chat_template.jinja"
    _, encoding, weights = made(ROWS[name], template(None if own else golden["template"], which), which)
    assert " ".join(map(str, encoding.ids)) == golden["ids"]
    assert " ".join(f"{weight:g}" for weight in weights) == golden["weights"]


@cache
def theirs(which: str, folder: Path) -> Any:
    """The same tokenizer file, opened by transformers."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    names = {
        f"{kind}_token": tokenizer(which).control_string(number)
        for kind, number in (("bos", tokenizer(which).bos_id), ("eos", tokenizer(which).eos_id))
    }
    if which == "mistral-v3":
        shutil.copy(asset(TOKENIZERS[which]), folder / "tokenizer.model")
        return transformers.LlamaTokenizer.from_pretrained(folder, legacy=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer(which).path), **names)


def expected(conversation: Conversation, source: str, oracle: Any) -> tuple[list[int], list[int]]:
    found = oracle.apply_chat_template(
        conversation.messages,
        tools=conversation.tools,
        chat_template=source,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return found["input_ids"], found["assistant_masks"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mistral")


# transformers' conversion of this model merges runs of spaces differently from sentencepiece
COMPARED = [case for case in CASES if case != ("mistral-v3", "code")]


@pytest.mark.parametrize(("which", "name"), COMPARED)
def test_masks_equal_those_of_transformers(which: str, name: str, folder: Path) -> None:
    golden = MASKS[which][name]
    own = golden["template"] == "chat_template.jinja"
    source = template(None if own else golden["template"], which).source
    if own:  # theirs needs the spans that ours finds without
        said = "message['content'] + '<|im_end|>'"
        assert said in source
        marked = "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}{{ "
        marked += said + " }}{% endgeneration %}{{ '\n' }}{% else %}{{'<|im_start|>'"
        source = source.replace("{{'<|im_start|>'", marked, 1)
        source = source.replace("+ '\n'}}{% endfor %}", "+ '\n'}}{% endif %}{% endfor %}", 1)
    conversation = normalise(ROWS[name])
    ids, mask = expected(conversation, source, theirs(which, folder))
    weights = [float(weight) for weight in golden["weights"].split()]
    assert ids == [int(i) for i in golden["ids"].split()]
    if name == "weights":  # of which transformers knows nothing
        assert {weight for weight, theirs_ in zip(weights, mask) if theirs_} == {0, 0.5, 1}
        mask = [bool(m) and weight > 0 for m, weight in zip(mask, weights)]
    differ = [i for i, (weight, m) in enumerate(zip(weights, mask)) if (weight > 0) != bool(m)]
    if (which, name) == ("smollm2", "spaces"):
        # "\n  " is one token of header and answer: transformers trains it, megalite does not
        (i,) = differ
        assert tokenizer(which).decode(ids[i : i + 1]) == "\n "
    else:
        assert not differ


@pytest.mark.parametrize(
    ("which", "name"),
    [
        ("smollm2", "chatml"),
        ("smollm2", "qwen"),
        ("deepseek", "alpaca"),
        ("deepseek", "llama2"),
        ("mistral-v3", "plain"),
    ],
)
def test_real_rows_equal_those_of_transformers(which: str, name: str, folder: Path) -> None:
    chat, oracle, compared, other = template(name, which), theirs(which, folder), 0, 0
    for file in ("alpaca_en_demo.json", "alpaca_zh_demo.json", "glaive_toolcall_en_demo.json"):
        for row in islice(read_rows(asset(f"instructions/{file}")), 25):
            conversation = normalise(row.value)
            if "tool" in file and name not in ("chatml", "qwen", "plain"):
                continue
            _, encoding, weights = made(row.value, chat, which)
            ids, mask = expected(conversation, chat.source, oracle)
            if which == "mistral-v3" and encoding.ids != ids:
                other += 1  # transformers' conversion has merges that sentencepiece, whose model it is, has not
                continue
            assert encoding.ids == ids, row.where
            assert [weight > 0 for weight in weights] == [bool(m) for m in mask], row.where
            compared += 1
    assert compared + other == (75 if name in ("chatml", "qwen", "plain") else 50)
    assert other <= 10


def test_a_token_across_the_border_of_a_span() -> None:
    """Trained only if it is inside the span, apart from leading whitespace."""
    text = "a: b c\n\n d"
    tokens = ["a", ":", " b", " c\n", "\n", " d"]
    ends = np.cumsum([len(token) for token in tokens]).tolist()
    encoding = Encoding(list(range(6)), [(end - len(token), end) for token, end in zip(tokens, ends)])
    assert token_weights(text, encoding, [(3, 6, 2.0)]).tolist() == [0, 0, 2, 0, 0, 0]  # " c\n" goes beyond
    assert token_weights(text, encoding, [(3, 7, 2.0)]).tolist() == [0, 0, 2, 2, 0, 0]
    assert token_weights(text, encoding, [(1, 2, 1.0), (4, 8, 0.5)]).tolist() == [0, 1, 0, 0.5, 0.5, 0]
    # in a token of whitespace alone, every character counts
    assert token_weights("\n\n", Encoding([0], [(0, 2)]), [(1, 2, 1.0)]).tolist() == [0]
    # no characters at all: sentencepiece's dummy prefix
    assert token_weights("ab", Encoding([0, 1], [(0, 0), (0, 2)]), [(0, 2, 1.0)]).tolist() == [0, 1]


def test_last_and_weights() -> None:
    conversation = normalise(ROWS["weights"])
    rendered = Rendered("abcdef", [Span(0, 1, 1, 1), Span(2, 3, 3, 3), Span(4, 5, 5, 5)])
    assert weighted_spans(conversation, rendered, "assistant") == [(0, 1, 0.0), (2, 3, 0.5), (4, 5, 1.0)]
    assert weighted_spans(conversation, rendered, "last") == [(4, 5, 1.0)]
    assert weighted_spans(conversation, rendered, "all") == [(0, 6, 1.0)]
    with pytest.raises(RowError, match="has no trained token"):
        require_trained(np.array([1.0, 0.0]))
