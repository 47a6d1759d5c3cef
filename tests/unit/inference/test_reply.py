from pathlib import Path

import pytest
from assets import asset

from megalite.inference.reply import Reply, Settings, StopStrings, in_order
from megalite.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def smollm() -> Tokenizer:
    return load_tokenizer(asset("smollm2"))


@pytest.fixture(scope="session")
def mistral() -> Tokenizer:
    return load_tokenizer(asset("mistral-v1/tokenizer.model"))


def feed(reply: Reply, ids: list[int]) -> list[str]:
    """The pieces of text as they come, until the reply ends."""
    pieces = []
    for token in ids:
        pieces.append(reply.push(token))
        if reply.ended:
            break
    return pieces


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["ab", "cd", "xyz"], ["ab", "cd", ""]),
        (["a x", "y", "z b"], ["a ", "", ""]),
        (["a x", "y", "y b"], ["a ", "", "xyy b"]),  # what looked like one is shown after all
        (["xxy", "z"], ["x", ""]),
        (["one x", "y"], ["one ", ""]),
        (["a END b xyz"], ["a "]),  # the first to come, whichever it is
    ],
)
def test_stop_strings(pieces: list[str], shown: list[str]) -> None:
    stops = StopStrings(["xyz", "END"])
    assert [stops.push(piece) for piece in pieces] == shown
    assert stops.found == ("xyz" in "".join(pieces) or "END" in "".join(pieces))
    rest = stops.finish()
    if not stops.found:
        assert "".join(shown) + rest == "".join(pieces)


@pytest.mark.parametrize("text", ["The end.\n\nQuestion: why", "月光，疑是\n\nQuestion: 霜", "😀 Que\n\nQuestion:"])
def test_a_stop_string_across_tokens(text: str, smollm: Tokenizer, mistral: Tokenizer) -> None:
    settings = Settings(100, stop=("\n\nQuestion:",))
    for tokenizer in (smollm, mistral):
        ids = tokenizer.encode(text)
        assert len(tokenizer.encode("\n\nQuestion:")) > 1
        reply = Reply(tokenizer, tokenizer.encode("Say:"), settings, ())
        pieces = feed(reply, ids)
        assert reply.ended == "stop string"
        assert "".join(pieces).strip() == text[: text.index("\n\nQuestion:")].strip()
        assert "\ufffd" not in "".join(pieces)
        assert reply.text == "".join(pieces)


def test_a_character_is_shown_when_its_bytes_are_complete(smollm: Tokenizer, mistral: Tokenizer) -> None:
    text = "𠮷野家 😀!"
    for tokenizer in (smollm, mistral):
        ids = tokenizer.encode(text)
        assert len(ids) > len(text)
        reply = Reply(tokenizer, tokenizer.encode("A:"), Settings(len(ids)), ())
        pieces = feed(reply, ids)
        assert "".join(pieces).strip() == text
        assert "" in pieces
        assert reply.ended == "length"


def test_bytes_that_form_no_character_are_shown_at_the_end(smollm: Tokenizer) -> None:
    half = smollm.encode("😀")[:1]
    reply = Reply(smollm, [5], Settings(1), ())
    assert feed(reply, half) == ["\ufffd"]


def test_a_first_word_keeps_its_space(mistral: Tokenizer) -> None:
    prompt, whole = mistral.encode("In the"), mistral.encode("In the beginning was")
    assert whole[: len(prompt)] == prompt
    reply = Reply(mistral, prompt, Settings(50), ())
    assert "".join(feed(reply, whole[len(prompt) :])) == " beginning was"


def test_each_stop_token_ends(smollm: Tokenizer) -> None:
    for stop in (0, 2):
        reply = Reply(smollm, [5], Settings(50), (0, 2))
        assert feed(reply, [*smollm.encode(" yes"), stop, 9]) == [" yes", ""]
        assert reply.ended == "stop token"
        assert reply.ids == smollm.encode(" yes")


def test_a_control_token_can_be_a_stop_string(smollm: Tokenizer) -> None:
    reply = Reply(smollm, [5], Settings(50, stop=("<|endoftext|>",)), ())
    feed(reply, [*smollm.encode(" yes"), 0])
    assert (reply.ended, reply.text) == ("stop token", " yes")


def test_a_reply_ends_where_positions_do(smollm: Tokenizer) -> None:
    reply = Reply(smollm, [5, 6, 7], Settings(50), (), limit=5)
    feed(reply, [9] * 10)
    assert (reply.ended, len(reply.ids)) == ("context end", 2)
    with pytest.raises(ValueError, match=r"the prompt has 5 tokens, but the model has 5 positions"):
        Reply(smollm, [5] * 5, Settings(50), (), limit=5)


def test_a_prompt_needs_a_token(smollm: Tokenizer) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        Reply(smollm, [], Settings(50), ())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0 and at most 9223372036854775807, e.g. 1234"),
        ({"seed": 10**20}, "seed=100000000000000000000 must be at least 0"),
        ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"stop": ("",)}, "an empty stop string"),
    ],
)
def test_settings_out_of_range(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


def test_replies_are_shown_one_after_the_other(smollm: Tokenizer) -> None:
    replies = [Reply(smollm, [5], Settings(n), ()) for n in (3, 1, 2)]
    (word,) = smollm.encode(" word")

    def pieces():
        for _ in range(3):
            for number, reply in enumerate(replies):
                if not reply.ended:
                    yield number, reply.push(word)

    shown_pieces = list(in_order(pieces(), replies))
    assert [number for number, _ in shown_pieces] == sorted(number for number, _ in shown_pieces)
    for number, reply in enumerate(replies):
        assert "".join(text for n, text in shown_pieces if n == number) == reply.text
        assert reply.text == " word" * len(reply.ids)
    assert [text for number, text in shown_pieces if number == 0 and text] == [" word"] * 3  # as they came


def test_a_reply_without_text_has_a_piece_too(smollm: Tokenizer) -> None:
    replies = [Reply(smollm, [5], Settings(3), (2,)) for _ in range(3)]
    shown_pieces = in_order(((n, reply.push(2)) for n, reply in enumerate(replies)), replies)
    assert list(dict.fromkeys(shown_pieces)) == [(0, ""), (1, ""), (2, "")]


def test_no_torch_is_needed(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, megalite.inference.reply, megalite.inference.source; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
