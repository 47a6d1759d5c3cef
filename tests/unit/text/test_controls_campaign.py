"""Random messages full of control strings, in random tokenizer folders."""

import random
from collections import Counter
from pathlib import Path

import pytest
from campaign import rounds
from tokenizer_folders import CHATML, TOKENS, make_folder, opened

from megalite.data.instructions import Options, Report, build_example
from megalite.text.chat import ChatTemplate
from megalite.text.controls import controls_of
from megalite.text.tokenizer import Tokenizer


def injected(ours: Tokenizer, draw: random.Random) -> str:
    """Check that no message of a conversation full of control strings contains a control token."""
    strings = [*ours.controls, *TOKENS]
    forms = [str, str.upper, lambda text: f" {text}", lambda text: f"{text}\n ", wide]

    def text() -> str:
        parts = [draw.choice(forms)(draw.choice(strings)) for _ in range(draw.randrange(1, 5))]
        return "a" + draw.choice(["", " ", "x", "\n"]).join(parts) + draw.choice(["", " ", "b"])

    roles = ("system", "user", "assistant")
    messages = [{"role": role, "content": text()} for role in roles]
    template, numbers = ChatTemplate("mine", CHATML, ours), set(ours.controls.values())
    try:
        found = build_example("row", {"messages": messages}, ours, template, Options(), Report(), controls_of(ours))
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
